"""RUN/report.html: one self-contained page with the numbers and the pictures of a run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #22262e; background: #f6f7f9; margin: 0; }
main { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
.lead { color: #5a6270; margin: 0 0 1.5rem; } p { margin: .3rem 0 .8rem; }
section { background: #fff; border: 1px solid #e3e6eb; border-radius: 10px; padding: 1.1rem 1.3rem; margin: 0 0 1.1rem; }
img { max-width: 100%; height: auto; display: block; margin: .4rem auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; } td.n, th.n { text-align: right; padding-left: 1.2rem; }
thead th { border-bottom: 1px solid #cfd4dc; font-weight: 600; } tr.mean td { border-top: 1px solid #e3e6eb; font-weight: 600; }
pre { background: #f6f7f9; border-radius: 6px; padding: .8rem 1rem; overflow: auto; font-size: .85rem; }
summary { cursor: pointer; font-weight: 600; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and a picture or ready HTML under it."""

    title: str
    text: str
    figure: Figure | None = None
    body: str = ""


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """One HTML file, pictures inside."""
    parts = "".join(
        f"<section><h2>{html.escape(s.title)}</h2><p>{html.escape(s.text)}</p>{picture(s)}{s.body}</section>"
        for s in sections
    )
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>{parts}</main></html>\n'
    )


def picture(section: Section) -> str:
    """The section's figure as an inline PNG."""
    if section.figure is None:
        return ""
    buffer = io.BytesIO()
    section.figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">'


def html_table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """words, numbers: the headings of columns of text and, after them, of figures. A row that begins with `mean` is bold."""

    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if i >= len(words) else ''}>{html.escape(text)}</{kind}>" for i, text in enumerate(row)
        )

    body = "".join(f"<tr{' class=mean' if row[0] == 'mean' else ''}>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', [*words, *numbers])}</tr></thead><tbody>{body}</tbody></table>"


def code(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
