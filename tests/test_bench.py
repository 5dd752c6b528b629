"""Claims about the training measurement: what is compared computes the same, and its work is counted from its shapes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from openjepa.bench import cost, measure, parts, peers
from openjepa.bench import train as bench
from openjepa.bench.train import PLAIN, Case, without
from openjepa.engine.device import pick_precision
from openjepa.masking import MaskingConfig, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.named import RECIPES
from tests.helpers import command, refused

MODEL = ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, width=24, depth=2, heads=2)
PREDICTOR = PredictorConfig(width=16, depth=2)
CASE = Case("tiny", MODEL, PREDICTOR, 4)


def test_the_released_way_computes_the_same():
    method, images = IJEPA(MODEL, PREDICTOR, LossConfig()), torch.randn(4, 3, 32, 32)
    masks = sample(MaskingConfig(), MODEL.grid, 0, 0, np.arange(4))
    ours = method(images, masks)["loss"]
    with without([*PLAIN]):
        theirs = method(images, masks)["loss"]
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)


def test_work_is_that_of_the_matrix_products():
    masks = sample(MaskingConfig(), MODEL.grid, 0, 0, np.arange(4))
    n, k, t, m = 64, masks.context.shape[-1], masks.targets.shape[-1], masks.targets.shape[1]

    def block(queries: int, keys: int, d: int) -> int:
        """Multiply-adds: q, k, v, output and MLP; scores and values."""
        return d * d * (2 * queries + 2 * keys + 8 * queries) + 2 * queries * keys * d

    patches, d, p = 3 * 4 * 4, 24, 16
    target = n * patches * d + 2 * block(n, n, d)
    encoder = 2 * block(k, k, d) + k * d * p
    learning = encoder + m * (block(k + t, k + t, p) + block(t, k + t, p) + t * p * d)
    first = k * patches * d  # images need no gradient: forward, and the weights' gradient
    assert bench.flops(CASE, [masks]) == 2 * (target + 3 * learning + 2 * first)

    learning = encoder + m * (2 * block(k + t, k + t, p) + t * p * d)  # the final block whole, all patches embedded
    assert bench.flops(CASE, [masks], [*PLAIN]) == 2 * (target + 3 * learning + 2 * n * patches * d)

    s = k + m * t  # every token once
    scores = 2 * p * m * t * (k + t)
    shared = 12 * s * p * p + 2 * p * k * k + scores + (2 * s + 10 * m * t) * p * p + scores
    learning = encoder + shared + m * t * p * d
    cheaper = replace(CASE, predictor=replace(PREDICTOR, context="shared"))
    assert bench.flops(cheaper, [masks]) == 2 * (target + 3 * learning + 2 * first)


def test_a_recipes_operations_are_those_of_its_networks_and_masks():
    recipe = RECIPES["ijepa_cifar10_alone_cpu"]()
    masks = [sample(recipe.masking, recipe.model.grid, 0, s, np.arange(32)) for s in range(2)]
    assert cost.operations(recipe, 2) == bench.flops(Case("", recipe.model, recipe.predictor, 32), masks)


def test_every_variant_takes_its_turn(monkeypatch):
    monkeypatch.setattr(bench, "CPU", (CASE,))
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(bench, "matrix_peak", lambda *_: 1e12)
    rows = bench.train(steps=2, warmup=1)
    best = pick_precision("auto", torch.device("cpu"))
    names = ["released", "float32", "bf16", f"compiled, {best}", f"shared context, {best}"]
    assert [row["variant"] for row in rows] == names
    assert rows[0]["over_released"] == 1.0
    assert rows[4]["gflop_per_image"] < rows[1]["gflop_per_image"]
    for row in rows:
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["images_per_s"] == pytest.approx(4 / row["median_s"])
        assert all(row[f"{part}_s"] > 0 for part in bench.PARTS)


def test_peers_take_their_turn_on_the_same_masks(monkeypatch):
    monkeypatch.setattr(peers, "cases", lambda _: (CASE,))
    seconds = peers.turn("openjepa", CASE, "fp32", steps=2, warmup=1)
    assert len(seconds) == 2
    assert min(seconds) > 0
    alternating = []
    monkeypatch.setattr(peers, "version", lambda _: "9.9")
    monkeypatch.setattr(
        peers, "in_its_own_process", lambda who, *_: alternating.append(who) or [1.0 if who == "lightly" else 0.5]
    )
    ours, _, theirs = peers.against("lightly")
    assert alternating == ["openjepa", "openjepa, shared context", "lightly"] * peers.TURNS
    assert (ours["over_lightly"], theirs["over_lightly"]) == (2.0, 1.0)


def test_a_checksum_is_timed_of_so_many_bytes():
    (row,) = parts.checksum(megabytes=2)
    assert row["gb_per_s"] == pytest.approx(0.002 / row["median_s"])


def test_a_profile_shares_out_the_time(monkeypatch):
    monkeypatch.setattr(bench, "CPU", (CASE,))
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device("cpu"))
    rows = bench.profile(steps=1)
    shares = [row["share"] for row in rows]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < sum(shares) <= 1


def test_techniques_are_left_out_one_at_a_time(monkeypatch):
    monkeypatch.setattr(bench, "CPU", (CASE,))
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(bench, "matrix_peak", lambda *_: 1e12)
    rows = bench.techniques(steps=2, warmup=1)
    assert [row["variant"] for row in rows] == ["openjepa", *(f"without {name}" for name in PLAIN)]


@pytest.mark.parametrize("peer", ["lightly", "stable_pretraining"])
def test_a_peers_module_learns(peer):
    """The loss of the peer falls on one batch: what is timed is training."""
    pytest.importorskip(peer)
    torch.manual_seed(0)
    module, step, follow = peers.PEERS[peer.replace("_", "-")](CASE)
    images, masks = torch.randn(4, 3, 32, 32), sample(MaskingConfig(), MODEL.grid, 0, 0, np.arange(4))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = step(images, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        follow()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_peer_that_is_not_here_is_said(monkeypatch, capsys):
    assert "did you mean 'lightly'" in refused(monkeypatch, capsys, "bench", "train", "--against", "lightl")
    assert "--against goes with bench train" in refused(monkeypatch, capsys, "bench", "masks", "--against", "lightly")
    monkeypatch.setattr(peers, "version", absent)
    assert "--group peers" in refused(monkeypatch, capsys, "bench", "train", "--against", "lightly")


def absent(name: str) -> str:
    raise ModuleNotFoundError(name)


def test_measurements_are_kept_in_one_file_for_a_machine(monkeypatch, capsys, tmp_path):
    file = tmp_path / "results" / "here.json"
    monkeypatch.setitem(measure.BENCHES, "masks", lambda: [{"masks": "even", "median_s": 0.5}])
    monkeypatch.setitem(measure.BENCHES, "data", lambda: [{"way": "ours", "median_s": 0.25}])
    for what in ("masks", "data", "masks"):
        assert command(monkeypatch, capsys, "bench", what, "--out", str(file))[0] == 0
    found = json.loads(file.read_text())
    assert list(found) == ["masks", "data"]
    assert found["data"]["rows"] == [{"way": "ours", "median_s": 0.25}]
    assert found["data"]["command"] == f"openjepa bench data --out {file}"
    assert "core" in found["data"]["environment"]["cpu"]
    assert "--plot goes with bench scaling" in refused(monkeypatch, capsys, "bench", "masks", "--plot", "a.png")
    assert "ends in .png" in refused(monkeypatch, capsys, "bench", "scaling", "--plot", "a.txt")
    monkeypatch.setitem(measure.BENCHES, "masks", None)  # refused before it is measured
    file.write_text("[1]")
    assert "--out" in refused(monkeypatch, capsys, "bench", "masks", "--out", str(file))
    assert file.read_text() == "[1]"
    assert "cannot write to" in refused(monkeypatch, capsys, "bench", "masks", "--out", str(file / "below"))


def test_measurements_come_as_a_table_and_as_json(monkeypatch, capsys):
    monkeypatch.setitem(measure.BENCHES, "masks", lambda: [{"masks": "multiblock", "images_per_s": 2.0}])
    printed = json.loads(command(monkeypatch, capsys, "bench", "masks", "--json")[1])
    assert printed["rows"] == [{"masks": "multiblock", "images_per_s": 2.0}]
    assert printed["environment"]["torch"]
    assert "images_per_s" in command(monkeypatch, capsys, "bench", "masks")[1]


def test_both_kinds_of_context_are_measured_on_the_same_steps():
    rows = {row["context"]: row for row in parts.context(steps=3, warmup=1)}
    assert rows["packed"]["context_tokens"] > rows["even"]["context_tokens"] > 0
    assert min(row["images_per_s"] for row in rows.values()) > 0


def test_a_step_is_timed_as_its_images_become_few(monkeypatch):
    monkeypatch.setattr(cost, "GIANTS", (CASE,))
    monkeypatch.setattr(cost, "FEW", (2, 4))
    rows = cost.batches(steps=2 * bench.MASKS, warmup=1)
    assert [(row["model"], row["batch"]) for row in rows] == [("tiny", 2), ("tiny", 4)]
    for row in rows:
        assert all(row[f"{part}_s"] > 0 for part in bench.PARTS)
        assert row["deviation"] > 0
