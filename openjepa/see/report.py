"""One self-contained page of numbers and pictures: on a phone, in dark and light, on paper; no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from openjepa.engine.whole import write_whole

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser's own guard of what is promised above
)
LARGE = 250_000  # bytes of a PNG, above which a picture becomes WebP

STYLE = """
:root { color-scheme: light dark; --ink: #22262e; --soft: #5a6270; --page: #f6f7f9; --card: #fff; --line: #e3e6eb;
  --link: #2459bd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #a0a8b5; --page: #14161a; --card: #1d2026; --line: #343943; --link: #8db2f8; }
  img { filter: brightness(.9); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 64rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 0 0 1.5rem; font-size: .9rem; }
.lead { color: var(--soft); margin: 0 0 .8rem; overflow-wrap: anywhere; } p { margin: .3rem 0 .8rem; }
.missing { color: var(--soft); font-style: italic; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem; margin: 0 0 1.1rem; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; margin: .4rem auto; border-radius: 6px; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; padding-left: .7rem; }
.wide td { white-space: nowrap; }
thead th { border-bottom: 1px solid var(--soft); font-weight: 600; }
tr.mean td { border-top: 1px solid var(--line); font-weight: 600; }
.facts th { color: var(--soft); font-weight: 400; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
pre { background: var(--page); border-radius: 6px; padding: .8rem 1rem; overflow: auto; font-size: .85rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  main { margin: 1.2rem auto; padding: 0 .6rem; }
  section { padding: .9rem .8rem; }
  img.broad { max-width: none; width: 40rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --page: #fff; --card: #fff; --line: #ccc; --link: #000; }
  body { font-size: 10pt; } main { max-width: none; margin: 0; padding: 0; } nav { display: none; } img { filter: none; }
  section { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .6rem 0; }
  h2, h2 + p { break-after: avoid; } img, tr { break-inside: avoid; }
  img { max-height: 22cm; width: auto !important; max-width: 100% !important; }
  .wide { overflow: visible; } table { font-size: 8pt; } td, th { padding-right: .5rem; }
  pre { white-space: pre-wrap; font-size: 7.5pt; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and a picture or ready HTML under it."""

    title: str
    text: str
    figure: Figure | Image.Image | None = None
    body: str = ""
    alt: str = ""  # what the picture shows, for who does not see it: the title unless told
    missing: bool = False  # the text says why there is nothing


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """One HTML file, pictures inside."""
    links = "".join(f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections))
    parts = "".join(
        f'<section id="s{i}"><h2>{html.escape(s.title)}</h2>{sentence(s)}{picture(s)}{s.body}</section>'
        for i, s in enumerate(sections)
    )
    write_whole(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p><nav>{links}</nav>{parts}</main></body></html>\n',
    )


def sentence(section: Section) -> str:
    return f"<p{' class=missing' if section.missing else ''}>{html.escape(section.text)}</p>" if section.text else ""


def picture(section: Section) -> str:
    """The section's figure inside the page. A broad one keeps a width that can be read on a phone, and scrolls."""
    if section.figure is None:
        return ""
    image = drawn(section.figure)
    kind, data = encoded(image)
    broad = " class=broad" if image.width > 1.4 * image.height else ""
    alt = html.escape(section.alt or section.title)
    fine = 1.5 if isinstance(section.figure, Figure) else 1  # pixels to one of the page's: 8 points are 11
    width, height = round(image.width / fine), round(image.height / fine)
    return (
        f'<div class="wide"><img{broad} alt="{alt}" width="{width}" height="{height}" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}"></div>'
    )


def drawn(figure: Figure | Image.Image, dpi: int = 150) -> Image.Image:
    """A figure as pixels."""
    if isinstance(figure, Image.Image):
        return figure
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def encoded(image: Image.Image) -> tuple[str, bytes]:
    """As PNG; photographs, which that makes large, as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    if buffer.tell() <= LARGE:
        return "png", buffer.getvalue()
    smaller = io.BytesIO()
    image.save(smaller, "WEBP", quality=88, method=4)
    return "webp", smaller.getvalue()


def html_table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """words, numbers: the headings of columns of text and, after them, of figures. A row that begins with `mean` is bold."""

    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if i >= len(words) else ''}>{html.escape(text)}</{kind}>" for i, text in enumerate(row)
        )

    body = "".join(f"<tr{' class=mean' if row[0] == 'mean' else ''}>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', [*words, *numbers])}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A list of names and what they are."""
    body = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
    )
    return f'<table class="facts">{body}</table>'


def code(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
