"""A tiny model, a few real files, and the golden numbers where they are at hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from openjepa.data import store
from openjepa.recipes import decoding
from openjepa.recipes.decoder import small
from openjepa.recipes.embedding import Embedding, embed
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe, from_dict
from tests.helpers import PAINTER, PAINTS, make_shards

if TYPE_CHECKING:
    from openjepa.studio.studio import Studio

SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure() -> None:
    """Tests that run side by side share the cores: threads beyond them wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(1)


TINY = {
    "model": {"size": "Ti", "image_size": [32, 32], "patch_size": 4, "width": 24, "depth": 2, "heads": 2},
    "predictor": {"width": 16, "depth": 1},
    "data": {"batch_size": 8},
    "optim": {"lr": 1e-3, "start_lr": 1e-4},
    "schedule": {"epochs": 2, "warmup_epochs": 0.5},
    "monitors": {"log_every": 1, "knn_images": 20},
    "precision": "fp32",
}


OWN = {  # of each method's own parts
    "ijepa": {"predictor": TINY["predictor"]},
    "mae": {"mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}},
    "ibot": {
        "ibot": {"prototypes": 32, "hidden": 16, "bottleneck": 8, "freeze_last_layer_epochs": 0.5},
        "crops": {"small": 2, "small_size": [16, 16]},
        "augment": {"jitter": [0.4, 0.4, 0.2, 0.1], "grey": 0.2, "blur": 0.5, "flip": 0.5},
    },
}


def recipe_of(name: str, **parts: object) -> Recipe:
    """A method with the tiny encoder, every checkpoint kept. parts: in the place of its own."""
    alike = {part: values for part, values in TINY.items() if part != "predictor"}
    model = TINY["model"] | ({"class_token": True} if name != "ijepa" else {})
    kept = {"machine": {"keep": 9, "checkpoint_every": 0.4}}
    return from_dict(Recipe, {"method": name, **alike, "model": model, **kept, **OWN[name], **parts})


@pytest.fixture
def tiny() -> Recipe:
    return from_dict(Recipe, TINY)


def needs(path: Path) -> Path:
    """A path below ../shared; without it the test is skipped, or fails where .ci/run says it must be there."""
    if not path.exists():
        if os.environ.get("OPENJEPA_REQUIRE_SHARED"):
            pytest.fail(f"{path} is required here")
        pytest.skip(f"{path.name} is not at hand (it is no part of the repository)")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    return needs(SHARED / "golden")


@pytest.fixture(scope="session")
def real_images() -> Path:
    return needs(SHARED / "data")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small PNG images in two classes that differ in colour."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, tint in (("blue", (0, 0, 120)), ("red", (120, 0, 0))):
        (root / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 100, (36, 40, 3)) + np.array(tint)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def two_shards(folder, tmp_path) -> str:
    files = sorted(folder.rglob("*.png"))
    make_shards(tmp_path, files, [int(f.parent.name == "red") for f in files])
    return str(tmp_path / "s-{00..01}.tar")


@pytest.fixture
def impatient(tmp_path, monkeypatch) -> None:
    """A cache of its own, and stores that are asked again at once."""
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WAITS_S", (0.01, 0.02))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with the cache elsewhere and the network down."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WAITS_S", (0.0,))

    def down(*_: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", down)
    monkeypatch.setattr(socket.socket, "connect", down)
    return here


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A finished tiny run on images that are not square, every checkpoint kept."""
    model = TINY["model"] | {"image_size": [24, 40]}
    recipe = from_dict(
        Recipe, TINY | {"model": model, "machine": {"keep": 99, "checkpoint_every": 0.2}, "masking": {"min_keep": 4}}
    )
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(recipe, str(folder), out, Console(quiet=True))
    return out


@pytest.fixture(scope="session")
def decoder(trained: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny decoder of the tiny run, every checkpoint kept."""
    out = tmp_path_factory.mktemp("decoded") / "decoder"
    decoding.train(str(trained), str(folder), out, small(PAINTER, 2), PAINTS, Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A studio that compares with few images and paints in few steps."""
    from openjepa.studio import studio as studio_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(studio_module, "GALLERY", 20)
        patch.setattr(studio_module, "USUAL", 10)
        patch.setattr(studio_module, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def studio(
    little: None, trained: Path, folder: Path, decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Studio:
    """Of the tiny run, with a decoder and a table of patches."""
    from openjepa.studio.studio import Studio

    features = tmp_path_factory.mktemp("features") / "patches.parquet"
    embed(
        Embedding(run=str(trained), data=str(folder), out=features, pool="patches", device="cpu"), Console(quiet=True)
    )
    return Studio(str(trained), str(decoder), str(features), device="cpu")


@pytest.fixture(scope="module", params=["mae", "ibot"])
def another_method(
    little: None, request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Studio:
    """Of a run that predicts no features."""
    from openjepa.studio.studio import Studio

    run = tmp_path_factory.mktemp(request.param) / "run"
    recipe = recipe_of(
        request.param, monitors={"log_every": 1, "knn_every": 0}, schedule={"epochs": 1, "warmup_epochs": 0.5}
    )
    pretrain(recipe, str(folder), run, Console(quiet=True))
    return Studio(str(run), device="cpu")
