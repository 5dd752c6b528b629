"""Claims about the studio: its answers are the run's, bad images are told, and it serves and loads nothing but itself."""

import builtins
import io
import shutil
import socket
import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from openjepa.errors import UserError
from openjepa.recipes.embedding import Embedding, embed
from openjepa.recipes.pretrain import pretrain
from openjepa.studio import stage
from openjepa.studio import studio as studio_module
from openjepa.studio.studio import Studio
from tests.conftest import recipe_of
from tests.helpers import encoded, refused

SHORT = {"epochs": 1, "warmup_epochs": 0.5}
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(studio_module, "GALLERY", 20)
        patch.setattr(studio_module, "USUAL", 10)
        patch.setattr(studio_module, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def studio(trained: Path, folder: Path, decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Of the tiny run, with a decoder and a table of patches."""
    features = tmp_path_factory.mktemp("features") / "patches.parquet"
    embed(
        Embedding(run=str(trained), data=str(folder), out=features, pool="patches", device="cpu"), Console(quiet=True)
    )
    return Studio(str(trained), str(decoder), str(features), device="cpu")


# ---------------------------------------------------------------- answers


def test_the_context_hides_the_block_and_nothing_else(studio):
    looked = studio.pick(3)
    place = studio.place(looked, (1, 2, 2, 3))
    found = np.asarray(studio.context(looked, place))
    left, top, right, bottom = place.box
    assert (found[top:bottom, left:right] == 128).all()
    outside = np.ones(found.shape[:2], dtype=bool)
    outside[top - 1 : bottom + 1, left - 1 : right + 1] = False  # the outline lies around it
    assert np.array_equal(found[outside], looked.shown.permute(1, 2, 0).numpy()[outside])


def test_what_is_expected_does_not_depend_on_what_is_hidden_but_its_rank_does(studio):
    looked = next(x for x in map(studio.pick, range(40)) if not (studio.images == x.seen).flatten(1).all(1).any())
    place = studio.place(looked, (1, 2, 2, 3))
    other = looked.seen.clone()
    patch = studio.trained.recipe.model.patch_size
    other[:, patch : 3 * patch, 2 * patch : 5 * patch] = 255
    found, again = (studio.gallery.nearest(x, place.masks(), 5) for x in (looked.seen, other))
    assert found.places == again.places
    assert found.cosines == pytest.approx(again.cosines, abs=1e-5)
    assert found.cosines == sorted(found.cosines, reverse=True)
    tiles, text = studio.expected(looked, place)
    assert len(tiles) == studio_module.FOUND
    assert f"number {studio.gallery.nearest(looked.seen, place.masks(), 1).rank} of 21" in text


def test_the_rank_is_first_for_a_prediction_that_comes_true(studio, monkeypatch):
    """Asked with the block's own features instead of a prediction, nothing can be nearer than the block itself."""
    looked = studio.pick(3)
    place = studio.place(looked, (1, 2, 2, 3))
    monkeypatch.setattr(studio.gallery.condition, "of", "block")
    assert studio.gallery.nearest(looked.seen, place.masks(), 1).rank == 1


def test_an_image_of_the_gallery_is_not_looked_for_in_itself(studio):
    looked = next(x for x in map(studio.pick, range(40)) if (studio.images == x.seen).flatten(1).all(1).any())
    found = studio.gallery.nearest(looked.seen, studio.place(looked, studio.usual()).masks(), 99)
    assert len(found.places) == found.others == studio_module.GALLERY - 1
    assert not any(torch.equal(studio.images[i], looked.seen) for i in found.places)


@pytest.fixture(scope="module", params=["mae", "ibot"])
def another_method(request, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Of a run that predicts no features."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    recipe = recipe_of(request.param, monitors={"log_every": 1, "knn_every": 0}, schedule=SHORT)
    pretrain(recipe, str(folder), run, Console(quiet=True))
    return Studio(str(run), device="cpu")


def test_where_nothing_is_predicted_the_blocks_own_likes_are_shown_and_no_rank_or_surprise(another_method):
    looked = another_method.pick(3)
    tiles, text = another_method.expected(looked, another_method.place(looked, another_method.usual()))
    assert len(tiles) == studio_module.FOUND
    assert "nothing is predicted here" in text
    assert "number" not in text
    assert not another_method.predicts
    size = looked.shown.shape[:0:-1]
    assert another_method.colours(looked).size == another_method.like(looked, 0, 0).size == size
    with pytest.raises(UserError, match="surprise needs a predictor of representations"):
        another_method.surprise(looked)


def test_samples_are_the_decoders_and_another_seed_gives_others(studio):
    looked = studio.pick(0)
    place = studio.place(looked, studio.usual())
    first, again, other = (studio.samples(looked, place, seed) for seed in (0, 0, 1))
    assert len(first) == studio_module.SAMPLES
    assert np.array_equal(first[0][0], again[0][0])
    assert not np.array_equal(first[0][0], other[0][0])


def test_surprise_colours_and_likeness_are_pictures_of_the_image(studio):
    looked = studio.pick(1)
    size = looked.shown.shape[:0:-1]
    picture, text = studio.surprise(looked)
    assert picture.size == studio.colours(looked).size == studio.like(looked, 0, 0).size == size
    assert "of 10 images" in text
    assert not np.array_equal(studio.like(looked, 0, 0), studio.like(looked, 2, 3))


def test_a_click_means_the_patch_under_it(studio):
    looked = studio.pick(0)
    width, height = studio.clickable(looked).size
    rows, columns = studio.grid
    assert width == studio_module.CLICKABLE
    for row, column in ((0, 0), (2, 3), (rows - 1, columns - 1)):
        x, y = int((column + 0.5) * width / columns), int((row + 0.5) * height / rows)
        assert studio.patch_at(looked, x, y) == (row, column)
    assert studio.patch_at(looked, width, 10 * height) == (rows - 1, columns - 1)


def test_a_block_of_an_image_of_the_table_finds_itself_in_place(studio, folder):
    looked = studio.upload((folder / "red" / "03.png").read_bytes())
    (_, words), *others = studio.search(looked, studio.place(looked, (1, 2, 1, 1)))
    assert words.startswith("1.000")
    assert words.endswith("red/03.png")
    assert len(others) == studio_module.FOUND - 1
    assert len(studio.search(looked, None)) == studio_module.FOUND


def test_a_table_of_another_run_and_a_decoder_of_another_step_are_refused(studio, trained, decoder):
    earlier = trained / "checkpoints" / sorted(p.name for p in (trained / "checkpoints").iterdir())[0]
    with pytest.raises(UserError, match="made for another encoder"):
        Studio(str(earlier), str(decoder))
    with pytest.raises(UserError, match="other weights"):
        Studio(str(earlier), table=str(studio.table.folder))


@pytest.mark.parametrize("block", [(0, 0, 0, 1), (-1, 0, 1, 1), (5, 9, 2, 1), (0, 0, 6, 10), (0, 0, 99, 1)])
def test_a_block_that_is_none_is_told(studio, block):
    with pytest.raises(UserError, match="block"):
        studio.place(studio.pick(0), block)


@pytest.mark.parametrize("sent", [None, "x", {}, {"top": 1}, {"top": 1.5, "left": 0, "height": 1, "width": 1},
                                  {"top": "1", "left": 0, "height": 1, "width": 1}])  # fmt: skip
def test_what_a_browser_sends_is_a_block_or_nothing(sent):
    assert stage.block(sent) is None
    assert stage.block({"top": 1, "left": 2, "height": 3, "width": 4, "image": "…"}) == (1, 2, 3, 4)


# ---------------------------------------------------------------- bad images


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "an empty file"),
        (b"<html>no image", "not an image"),
        (encoded(Image.new("RGB", (400, 400), "red"), "JPEG")[:300], "image"),
        (bomb(50_000, 50_000), "50000x50000 pixels are more than the 50 million"),
        (encoded(Image.new("RGB", (3, 100)), "PNG"), "smaller than a patch of 4"),
        (bytes(studio_module.MOST_BYTES + 1), "20 MB are more than the 20"),
    ],
)
def test_an_upload_that_cannot_be_looked_at_is_told(studio, raw, said):
    with pytest.raises(UserError, match=said):
        studio.upload(raw)


def test_an_upload_too_large_is_never_decoded(studio, monkeypatch):
    monkeypatch.setattr(studio_module, "seen", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="million"):
        studio.upload(encoded(Image.new("L", (8000, 8000)), "PNG"))


def test_an_upright_photograph_of_any_mode_is_taken(studio):
    for mode in ("L", "RGBA", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        looked = studio.upload(encoded(Image.new(mode, (90, 50)), kind))
        assert looked.seen.shape == (3, 24, 40)


# ---------------------------------------------------------------- the command


def test_a_port_in_use_is_told_before_anything_is_loaded(monkeypatch, capsys, trained, tmp_path):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        error = refused(monkeypatch, capsys, "studio", str(tmp_path / "none"), "--port", str(port))
    assert f"port {port} of 127.0.0.1 is in use" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}"], "is not a run"),
        (["{empty}"], "has no checkpoint yet"),
        (["{run}", "--port", "99999"], "give 1 to 65535"),
        (["{run}", "--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["{run}", "--decoder", "{run}"], "is no decoder"),
        (["{run}", "--table", "{tmp}"], "no table"),
        (["{decoder}"], "is a decoder and holds no encoder"),
    ],
)
def test_what_the_studio_cannot_show_is_told_in_one_line(monkeypatch, capsys, trained, decoder, tmp_path, words, said):
    pytest.importorskip("gradio")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(trained / "recipe.yaml", empty)
    names = {"tmp": tmp_path, "empty": empty, "run": trained, "decoder": decoder}
    port = [] if "--port" in words else ["--port", str(free_port())]
    assert said in refused(monkeypatch, capsys, "studio", *(word.format(**names) for word in words), *port)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, trained):
    imported = builtins.__import__

    def without(name, *rest, **more):
        if name == "gradio":
            raise ImportError("none", name="gradio")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'openjepa[studio]'" in refused(monkeypatch, capsys, "studio", str(trained))


# ---------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(studio, tmp_path_factory):
    """The page, served."""
    pytest.importorskip("gradio")
    from openjepa.studio.serve import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        blocks, address = launch(studio, "127.0.0.1", free_port())
        yield address.rstrip("/")
        blocks.close(verbose=False)


def got(url: str, **headers: str) -> tuple[int, str, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, "", dict(error.headers)


def test_the_page_names_no_other_server_and_its_policy_allows_none(address):
    status, page, headers = got(address)
    assert status == 200
    assert "fonts.googleapis" not in page
    assert 'href="https://' not in page
    assert 'src="https://' not in page
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert '"analytics_enabled":false' in page.replace(" ", "") or '"analytics_enabled":false' in got(
        f"{address}/config"
    )[1].replace(" ", "")


def test_no_file_is_served_neither_the_runs_nor_another(address, studio):
    for file in ("/etc/passwd", str(studio.trained.run / "recipe.yaml"), str(Path(__file__)), "../../etc/passwd"):
        assert got(f"{address}/gradio_api/file={file}")[0] in (403, 404)


def test_another_sites_name_that_leads_here_is_refused(address):
    assert got(address, Host="evil.example")[0] == 400


def test_an_upload_that_is_too_large_is_cut_off(address):
    """By the server, before anything looks at it."""
    import httpx

    files = {"files": ("large.png", io.BytesIO(bytes(studio_module.MOST_BYTES + 10**6)), "image/png")}
    assert httpx.post(f"{address}/gradio_api/upload", files=files, timeout=120).status_code == 413
    small = {"files": ("small.png", io.BytesIO(bytes(1000)), "image/png")}
    assert httpx.post(f"{address}/gradio_api/upload", files=small, timeout=120).status_code == 200


def test_a_users_mistake_becomes_a_message_without_markup(studio):
    gr = pytest.importorskip("gradio")
    from openjepa.studio.page import Page, told

    page = Page(studio)
    with pytest.raises(gr.Error, match="numbered 0 to 39"):
        told(page.pick)(99, None)
    with pytest.raises(gr.Error, match="choose an image first"):
        told(page.search)(None, None, True)

    def nasty():
        raise UserError("<img src=x>")

    with pytest.raises(gr.Error) as error:
        told(nasty)()
    assert "<" not in error.value.message


def test_curves_are_drawn_again_when_something_was_logged_and_only_then(studio):
    gr = pytest.importorskip("gradio")
    from openjepa.studio.page import Page

    page = Page(studio)
    when, curves, numbers = page.training(-1.0)
    assert isinstance(curves, Image.Image)
    assert "feature rank" in numbers
    assert page.training(when) == (gr.skip(), gr.skip(), gr.skip())


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_a_browser_drags_uploads_clicks_searches_and_asks_nobody_else(browser, address, studio, tmp_path, monkeypatch):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    asked, troubles = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_text("What is really there").wait_for()
    page.get_by_text("sample 3").wait_for()
    block = page.locator(".masked")
    columns = studio.grid[1]
    top, left, height, width = studio.usual()
    box = block.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - box["width"] / width, y - box["height"] / height, steps=4)  # a patch up, a patch left
    page.mouse.up()
    page.wait_for_function(f"document.querySelector('.masked').style.left === '{100 * (left - 1) / columns:g}%'")
    looked = studio.pick(0)
    text = studio.expected(looked, studio.place(looked, (top - 1, left - 1, height, width)))[1]
    page.get_by_text(text).wait_for()
    file = tmp_path / "mine.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
    page.locator("input[type=file]").first.set_input_files(file)
    looked = studio.upload(file.read_bytes())
    page.get_by_text(studio.expected(looked, studio.place(looked, (top - 1, left - 1, height, width)))[1]).wait_for()
    page.get_by_role("tab", name="Patches").click()
    page.locator(".picture img:visible").nth(2).wait_for()
    asked_of = []
    monkeypatch.setattr(
        studio, "like", lambda looked, row, column: asked_of.append((row, column)) or studio.colours(looked)
    )
    image = page.locator(".picture img:visible").first
    size = image.bounding_box()
    image.click(position={"x": size["width"] * 7.5 / columns, "y": size["height"] * 1.5 / studio.grid[0]})
    for _ in range(600):
        if asked_of:
            break
        page.wait_for_timeout(100)
    assert asked_of == [(1, 7)]
    page.get_by_role("tab", name="Search").click()
    page.get_by_role("button", name="what is in the block").click()
    page.locator(".caption-label:visible").first.wait_for()
    page.get_by_role("tab", name="Training").click()
    page.get_by_text("feature rank").wait_for()
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    assert not troubles


@pytest.mark.slow
def test_a_browser_sees_a_run_of_another_method_whole(browser, another_method, tmp_path, monkeypatch):
    from openjepa.studio.serve import launch

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks, address = launch(another_method, "127.0.0.1", free_port())
    page, troubles = browser.new_page(viewport={"width": 1200, "height": 900}), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_text("nothing is predicted here").wait_for()
    page.locator(".picture img:visible").first.wait_for()
    assert page.get_by_text("Surprise").is_hidden()
    image, context = (page.locator(f"{name} img:visible").first.bounding_box() for name in (".stage", ".picture"))
    assert image["y"] == pytest.approx(context["y"], abs=1)
    assert image["width"] == pytest.approx(context["width"], abs=1)
    for tab, count in (("Patches", 3), ("Training", 1)):
        page.get_by_role("tab", name=tab).click()
        page.locator(".picture img:visible").nth(count - 1).wait_for()
    assert not troubles
    blocks.close(verbose=False)


@pytest.mark.slow
def test_a_browser_is_told_of_a_bad_upload(browser, address, tmp_path):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_text("What is really there").wait_for()
    for name, raw, said in (
        ("a.png", b"no image", "cannot be read"),
        ("b.png", bomb(50_000, 50_000), "50000x50000 pixels"),
    ):
        (tmp_path / name).write_bytes(raw)
        page.reload()
        page.get_by_text("What is really there").wait_for()
        page.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.get_by_text(said).wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_fits_a_phone_and_paper(browser, trained, tmp_path, scheme):
    from openjepa.recipes.report import report

    run = shutil.copytree(trained, tmp_path / "run")
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report(run).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ink, ground = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = [sum(map(int, c[4:-1].split(","))) for c in (ink, ground)]
    assert (light[0] < light[1]) == (scheme == "light")
    assert abs(light[0] - light[1]) > 400
    assert [url for url in asked if not url.startswith("data:")] == [(run / "report.html").as_uri()]
    assert len(page.pdf(format="A4")) > 10_000
