"""Claims about the studio's page: what a server sends of it, and what a browser shows of it and of a report."""

import asyncio
import io
import os
import shutil
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openjepa.errors import UserError
from openjepa.studio import studio as studio_module
from tests.helpers import bomb, free_port

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

# ---------------------------------------------------------------- the server


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


def test_nothing_is_fetched_from_elsewhere_for_whoever_asks(address):
    for path in ("file=https://example.com/a.png", "file=HTTP://example.com/a.png", "proxy=https://a.hf.space/"):
        assert got(f"{address}/gradio_api/{path}")[0] == 403
    assert got(f"{address}/gradio_api/runs")[0] == 404
    from gradio import processing_utils

    with pytest.raises(ValueError, match="only files that were uploaded"):
        asyncio.run(processing_utils.async_ssrf_protected_download("https://example.com/a.png", "."))


def test_what_another_sites_page_sends_is_refused(address):
    """A form of any site that is open in the same browser can send files here, though not read the answer."""
    import httpx

    def sent(site: str) -> int:
        files = {"files": ("a.png", io.BytesIO(b"a"), "image/png")}
        return httpx.post(f"{address}/gradio_api/upload", files=files, headers={"Sec-Fetch-Site": site}).status_code

    assert [sent(site) for site in ("cross-site", "same-site", "same-origin")] == [403, 403, 200]


def test_neither_a_proxy_nor_a_slow_machine_keeps_it_from_starting(studio, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from openjepa.studio.serve import launch

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.com")
    blocks, _ = launch(studio, "127.0.0.1", free_port())
    blocks.close(verbose=False)
    assert os.environ["no_proxy"] == "example.com,127.0.0.1,localhost"


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


def test_what_was_uploaded_goes_when_the_studio_is_ended(monkeypatch):
    from openjepa.studio import serve

    class Blocks:
        def close(self, verbose: bool) -> None:
            (Path(os.environ["GRADIO_TEMP_DIR"]) / "upload.png").write_bytes(b"")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(serve, "launch", lambda studio, host, port: (Blocks(), "http://127.0.0.1:1"))
    monkeypatch.setattr(threading.Event, "wait", lambda event: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit):
            serve.serve(None, "127.0.0.1", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


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
    assert page.locator("input[type=number]").first.input_value() == ""  # it has no number
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
