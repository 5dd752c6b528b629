"""The studio's page in Gradio: which component asks what. The answers are in `studio`."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any, TypeVar

from openjepa.errors import UserError, needs
from openjepa.rng import key
from openjepa.see.report import facts
from openjepa.studio import stage
from openjepa.studio.studio import FOUND, SAMPLES, Looked, Studio

with needs("studio"):
    import gradio as gr

EVERY = 3.0  # seconds between looks at the log
KEPT = (600, 3600)  # seconds: how often what was uploaded and drawn is looked through, and how old it grows
STYLE = """
footer { display: none !important; }
.gradio-container { width: 100% !important; max-width: 76rem !important; margin: auto; }
.picture .image-container, .picture .image-frame, .picture img { width: 100%; height: auto; object-fit: contain; }
.staged .html-container { padding: 0 !important; }
.curves { max-width: 46rem; }
.found .grid-wrap { min-height: 0; max-height: none; }
@media (max-width: 34rem) { .found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
.numbers { overflow-x: auto; font-variant-numeric: tabular-nums; }
.numbers :is(table, tr, th, td) { border: 0 !important; box-shadow: none !important; }
.numbers tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.numbers th { text-align: left; font-weight: 400; opacity: .75; padding-right: 1.5rem; white-space: nowrap; }
"""

F = TypeVar("F", bound=Callable[..., Any])


def told(function: F) -> F:
    """A user's mistake becomes a message on the page."""

    @functools.wraps(function)
    def asked(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return asked  # type: ignore[return-value]


def theme() -> Any:
    """Gradio's own without fonts from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Page:
    """The functions that components call: each takes and gives what Gradio's components hold."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def staged(self, looked: Looked, block: stage.Block) -> tuple[Looked, dict[str, Any]]:
        from openjepa.see.sheet import Cell, draw

        return looked, stage.value(draw(Cell(looked.shown)), self.studio.grid, block)

    def pick(self, number: float | None, staged: Any) -> tuple[Looked, dict[str, Any]]:
        return self.staged(self.studio.pick(int(number or 0)), stage.block(staged) or self.studio.usual())

    def another(self, number: float | None) -> int:
        """A number that follows from the last one, as if drawn."""
        return key(int(number or 0), "another image") % len(self.studio.source)

    def upload(self, raw: bytes | None, staged: Any) -> tuple[Looked, dict[str, Any], None]:
        """The last is the number of the image, which one's own has not."""
        if raw is None:
            raise UserError("nothing came: choose an image file")
        return *self.staged(self.studio.upload(raw), stage.block(staged) or self.studio.usual()), None

    def place(self, looked: Looked | None, staged: Any) -> Any:
        block = stage.block(staged)
        if looked is None or block is None:
            raise UserError("choose an image first")
        return self.studio.place(looked, block)

    def behind(self, looked: Looked, staged: Any) -> tuple[Any, Any, str]:
        place = self.place(looked, staged)
        tiles, text = self.studio.expected(looked, place)
        return self.studio.context(looked, place), tiles, text

    def samples(self, looked: Looked, staged: Any, seed: float | None) -> Any:
        return self.studio.samples(looked, self.place(looked, staged), max(0, int(seed or 0)))

    def surprise(self, looked: Looked) -> tuple[Any, str]:
        return self.studio.surprise(looked)

    def patches(self, looked: Looked) -> tuple[Any, Any, Any]:
        """The image, its colours, and what is like its middle."""
        rows, columns = self.studio.grid
        middle = self.studio.like(looked, rows // 2, columns // 2)
        return self.studio.clickable(looked), self.studio.colours(looked), middle

    def clicked(self, looked: Looked | None, x: int, y: int) -> Any:
        if looked is None:
            raise UserError("choose an image first")
        return self.studio.like(looked, *self.studio.patch_at(looked, x, y))

    def search(self, looked: Looked | None, staged: Any, whole: bool) -> Any:
        if looked is None:
            raise UserError("choose an image first")
        return self.studio.search(looked, None if whole else self.place(looked, staged))

    def training(self, when: float) -> tuple[Any, Any, Any]:
        """Curves and numbers where something was logged since."""
        now = self.studio.log()
        if now == when:
            return gr.skip(), gr.skip(), gr.skip()
        image, numbers = self.studio.curves()
        return now, image, facts(numbers)


def build(studio: Studio) -> Any:
    """The page: gr.Blocks, to be launched by `serve`."""
    page = Page(studio)
    networks: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "networks", "api_visibility": "private"}
    run, method = studio.trained.run, studio.trained.recipe.method
    last = len(studio.source) - 1
    with gr.Blocks(title=f"openjepa: {run.name}", analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown(f"## {escaped(run.name)}\n{escaped(method)} at step {studio.trained.step:,}")
        looked = gr.State(None, time_to_live=KEPT[1])
        with gr.Row(equal_height=True):
            with gr.Column(scale=1, min_width=260):
                number = gr.Number(0, label=f"image of the run's data, 0 to {last:,}", precision=0)
                another = gr.Button("another", size="sm")
            with gr.Column(scale=2, min_width=260):
                upload = gr.File(label="or your own image", type="binary", file_types=["image"], height=120)
        with gr.Tabs():
            with gr.Tab("Behind a block"):
                with gr.Row():
                    with gr.Column(min_width=220):
                        gr.Markdown("**Drag the block**, or its corner")
                        staged = gr.HTML(
                            stage.value(blank(studio), studio.grid, studio.usual()),
                            html_template=stage.HTML, css_template=stage.CSS, js_on_load=stage.JS, elem_classes="staged",
                        )  # fmt: skip
                    with gr.Column(min_width=220):
                        gr.Markdown("**Context**: what is seen")
                        context = picture()
                    with gr.Column(min_width=220, visible=studio.predicts):
                        gr.Markdown("**Surprise**: what is not as predicted")
                        surprise = picture()
                        score = gr.Markdown()
                expected_text = gr.Markdown()
                expected = gallery("blocks of other images", FOUND // 2)
                with gr.Column(visible=studio.decoder is not None):
                    gr.Markdown("**What the decoder paints** there")
                    samples = gallery("what the decoder paints there", SAMPLES)
                    seed = gr.Number(0, label="seed of the samples' noise", precision=0)
            with gr.Tab("Patches"):
                gr.Markdown("**Click a patch** of the image: the map shows what is like it, from 0 to 1 (cosine, less what is "
                            "usual at each place). Colours are the three principal components, the same for all.")  # fmt: skip
                with gr.Row():
                    clickable, colours, like = map(titled, ("Image", "Principal components", "Like the patch"))
            with gr.Tab("Search", visible=studio.table is not None):
                with gr.Row():
                    by_image = gr.Button("images like this one")
                    by_block = gr.Button("images like what is in the block",
                                         visible=studio.table is not None and studio.table.of_patches)  # fmt: skip
                found = gallery("from the table", FOUND // 2)
            with gr.Tab("Training"):
                with gr.Column(elem_classes="curves"):
                    curves = picture()
                numbers = gr.HTML(elem_classes="numbers")
        when, timer = gr.State(-1.0), gr.Timer(EVERY)

        def listen(event: Any, function: Callable[..., Any], inputs: Any, outputs: Any, **more: Any) -> Any:
            return event(told(function), inputs, outputs, **{**networks, **more})

        def follow(event: Any) -> None:
            """What is asked again for another image."""
            event = listen(event.success, page.behind, [looked, staged], [context, expected, expected_text])
            if studio.decoder:
                event = listen(event.success, page.samples, [looked, staged, seed], samples)
            if studio.predicts:
                event = listen(event.success, page.surprise, looked, [surprise, score])
            listen(event.success, page.patches, looked, [clickable, colours, like])

        follow(listen(blocks.load, page.pick, [number, staged], [looked, staged]))
        follow(listen(number.submit, page.pick, [number, staged], [looked, staged]))
        drawn = listen(another.click, page.another, number, number)
        follow(listen(drawn.success, page.pick, [number, staged], [looked, staged]))
        follow(listen(upload.upload, page.upload, [upload, staged], [looked, staged, number]))
        dragged = listen(staged.input, page.behind, [looked, staged], [context, expected, expected_text],
                         trigger_mode="always_last", show_progress="minimal")  # fmt: skip
        if studio.decoder:
            listen(dragged.success, page.samples, [looked, staged, seed], samples)
            listen(seed.submit, page.samples, [looked, staged, seed], samples)

        def clicked(looked: Looked | None, event: gr.SelectData) -> Any:
            return page.clicked(looked, event.index[0], event.index[1])

        clickable.select(with_event(clicked), looked, like, **networks)
        listen(by_image.click, lambda seen, at: page.search(seen, at, True), [looked, staged], found)
        listen(by_block.click, lambda seen, at: page.search(seen, at, False), [looked, staged], found)
        listen(timer.tick, page.training, when, [when, curves, numbers], show_progress="hidden", concurrency_id="log")
    return blocks


def with_event(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`told`, for a function that takes where was clicked: Gradio looks for the annotation."""

    def asked(looked: Any, event: gr.SelectData) -> Any:
        return told(function)(looked, event)

    asked.__annotations__["event"] = gr.SelectData
    return asked


def titled(title: str) -> Any:
    """A picture below its name, which would lie on it as its label, and keep clicks from what it covers."""
    with gr.Column(min_width=220):
        gr.Markdown(f"**{title}**")
        return picture()


def picture() -> Any:
    return gr.Image(
        format="png", interactive=False, show_label=False, buttons=[], container=False, elem_classes="picture"
    )


def gallery(label: str, columns: int) -> Any:
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        format="png",
        object_fit="contain",
        height="auto",
        buttons=[],
        interactive=False,
        elem_classes="found",
    )


def blank(studio: Studio) -> Any:
    """What is there until the first image comes."""
    from PIL import Image

    height, width = studio.trained.recipe.model.image_size
    return Image.new("RGB", (width, height), (200, 204, 212))


def escaped(text: str) -> str:
    """A name, as it is, in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|<>~$" else c for c in text)
