"""Claims about the training measurement: what is compared computes the same, and its work is counted from its shapes."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from openjepa.bench import cost, measure, parts, peers
from openjepa.bench import train as bench
from openjepa.bench.train import CPU, PLAIN, Case, Variant, without
from openjepa.engine.device import pick_precision
from openjepa.masking import MaskingConfig, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models import layers
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.named import RECIPES
from tests.helpers import command, encoded, refused

MODEL = ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, width=24, depth=2, heads=2)
PREDICTOR = PredictorConfig(width=16, depth=2)
CASE = Case("tiny", MODEL, PREDICTOR, 4)


def awake() -> IJEPA:
    """Weights so large that attention attends, in float32."""
    torch.manual_seed(0)
    method = IJEPA(MODEL, PREDICTOR, LossConfig())
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return method.train()


def loss_and_gradients(plain: list[str]) -> torch.Tensor:
    method, images = awake(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with without(plain):
        loss = method(images, sample(MaskingConfig(), MODEL.grid, 0, 0, np.arange(4)))["loss"]
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in method.parameters() if p.grad is not None)])


@pytest.mark.parametrize("names", [[name] for name in PLAIN if PLAIN[name]] + [[*PLAIN]])
def test_a_plain_way_has_the_same_loss_and_gradients(names, monkeypatch):
    ours = loss_and_gradients([])
    assert (ours - loss_and_gradients(names)).norm() / ours.norm() < 1e-5
    monkeypatch.setattr(layers, "attention", lambda q, k, v, _=None: v.mean(-2, keepdim=True).expand_as(q))
    assert (ours - loss_and_gradients([])).norm() / ours.norm() > 1e-3  # the mean of the values is told from attention


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def stepped(plain: list[str], steps: int = 3) -> tuple[bench.Trainee, Counter[str]]:
    """A trainee after some steps, and what they were made of."""
    trainee = bench.Trainee(Variant("", CASE, "fp32", plain), torch.device("cpu"))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with Operators() as counted:
        for step in range(steps):
            trainee.step(images, sample(MaskingConfig(), MODEL.grid, 0, step, np.arange(4)))
    return trainee, counted.seen


def test_fused_updates_of_optimiser_and_moving_average_equal_those_of_one_parameter_after_another():
    (ours, fused), (theirs, plain) = stepped([]), stepped(["fused updates"])
    assert fused["_fused_adamw_"] == 2 * 3  # groups, steps
    assert fused["_foreach_lerp_"] == 3
    assert plain["_fused_adamw_"] == plain["_foreach_lerp_"] == plain["_foreach_addcdiv_"] == 0
    began = bench.Trainee(Variant("", CASE, "fp32"), torch.device("cpu")).method.state_dict()
    ours, theirs = ours.method.state_dict(), theirs.method.state_dict()
    assert any(not torch.equal(ours[name], began[name]) for name in ours if name.startswith("target_encoder"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_the_faster_attention_is_left_out_for_the_other_one(dtype, fused):
    q, k, v = torch.randn(3, 2, 2, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = []
    for kernel in (layers.attention, bench.other_attention):
        with Operators() as counted:
            out = kernel(q, k, v)
        seen.append(sum(n for name, n in counted.seen.items() if "scaled_dot_product" in name))
        torch.testing.assert_close(
            out.float(), layers.plain_attention(*(x.float() for x in (q, k, v))), rtol=0, atol=0.02
        )
    assert [min(n, 1) for n in seen] == [1 - fused, fused]


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
    assert rows[0]["over_released"] == rows[0]["over_released_to"] == 1.0
    assert all(row["over_released_from"] <= row["over_released"] <= row["over_released_to"] for row in rows)
    assert [row["target_casts_s"] > 0 for row in rows] == [False, False, True, best == "bf16", best == "bf16"]
    assert rows[4]["gflop_per_image"] < rows[1]["gflop_per_image"]
    for row in rows:
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["images_per_s"] == pytest.approx(4 / row["median_s"])
        assert all(row[f"{part}_s"] > 0 for part in bench.PARTS)
        assert row["peak_bf16_gflops"] == row["peak_fp32_gflops"] == 1e3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak anew")
def test_memory_is_of_one_variant_and_grows_with_its_images():
    """Weights, both moments and gradients, and of each image what backward keeps: in four linear layers a block their inputs."""
    measured = {}
    alive = []
    for batch in (64, 8, 64):  # the second beside a larger one, which has taken a step; the third beside both
        case = replace(CPU[0], batch=batch)
        masks = sample(MaskingConfig(), case.model.grid, 0, 0, np.arange(batch))
        images = torch.randn(batch, 3, *case.model.image_size)
        alive.append(trainee := bench.Trainee(Variant("", case, "fp32"), torch.device("cpu")))
        trainee.step(images, masks)
        most = trainee.most_memory(images, [masks])["peak_memory_gib"] * 2**30
        assert most == pytest.approx(measured.setdefault(batch, most), rel=0.1)
        assert len(trainee.seconds) == 1
    learning = sum(p.nbytes for p in trainee.method.parameters() if p.requires_grad)
    inputs = masks.context.shape[-1] * case.model.n_blocks * case.model.dim * (1 + 1 + 1 + 4) * 4
    assert 4 * learning + 8 * inputs < measured[8] < 8 * learning
    assert measured[64] - measured[8] > 56 * inputs


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak anew")
def test_memory_is_left_out_where_it_may_not_be_asked(monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert bench.Trainee(Variant("", CASE, "fp32"), torch.device("cpu")).most_memory(torch.zeros(1), []) == {}


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
    ours, *_, theirs = peers.against("lightly")
    assert alternating == [*peers.OURS, "lightly"] * peers.TURNS
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
def test_a_peers_work_is_ours(peer):
    """By operations of the matrix products: lightly's that of the plain way, stable-pretraining's near the shared context's."""
    pytest.importorskip(peer)
    name = peer.replace("_", "-")
    model = ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=4)
    case = peers.like(name, Case("small", model, PredictorConfig(width=96), 4))
    images, masks = torch.randn(4, 3, 32, 32), sample(MaskingConfig(), model.grid, 0, 0, np.arange(4))
    _, step, _ = peers.PEERS[name](case)
    with FlopCounterMode(display=False) as counted:
        step(images, masks).backward()
    theirs = counted.get_total_flops() / 4
    if peer == "stable_pretraining":
        case = replace(case, predictor=replace(case.predictor, context="shared"))
    plain = ["embedding the visible alone", "a final block of targets alone"]
    assert theirs == pytest.approx(
        bench.flops(case, [masks], plain), rel=0.05
    )  # stable-pretraining's blocks see each other


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
    (tmp_path / "d.png").mkdir()
    assert "in a folder that is there" in refused(
        monkeypatch, capsys, "bench", "scaling", "--plot", str(tmp_path / "d.png")
    )
    assert "cannot make /proc/x" in refused(monkeypatch, capsys, "bench", "masks", "--out", "/proc/x/y.json")
    assert "--out is empty" in refused(monkeypatch, capsys, "bench", "masks", "--out", "")
    file.write_text("[1]")
    assert "--out" in refused(monkeypatch, capsys, "bench", "masks", "--out", str(file))
    assert file.read_text() == "[1]"
    assert "cannot write to" in refused(monkeypatch, capsys, "bench", "masks", "--out", str(file / "below"))


def test_a_folder_that_goes_while_it_is_measured_is_one_line(monkeypatch, capsys, tmp_path):
    file = tmp_path / "gone" / "here.json"
    monkeypatch.setitem(
        measure.BENCHES, "masks", lambda: file.parent.rmdir() or [{"what": "masks", "images_per_s": 1.0}]
    )
    status, said, error = command(monkeypatch, capsys, "bench", "masks", "--out", str(file))
    assert status == 2
    assert "images_per_s" in said.replace("\n", "")  # told before
    assert "could not be written" in error
    assert "Traceback" not in error


def test_measurements_come_as_a_table_and_as_json(monkeypatch, capsys):
    monkeypatch.setitem(measure.BENCHES, "masks", lambda: [{"masks": "multiblock", "images_per_s": 2.0}])
    printed = json.loads(command(monkeypatch, capsys, "bench", "masks", "--json")[1])
    assert printed["rows"] == [{"masks": "multiblock", "images_per_s": 2.0}]
    assert printed["environment"]["torch"]
    assert "images_per_s" in command(monkeypatch, capsys, "bench", "masks")[1]


def test_many_quantities_of_many_ways_fit_a_terminal_whole(monkeypatch, capsys):
    names = ["released", "float32", "bf16", "compiled, bf16", "shared context, bf16"]
    rows = [
        {"model": model, "variant": name, **{f"quantity_{q}_s": 1234.5 + 100 * m + 10 * v + q for q in range(9)}}
        for m, model in enumerate(("ViT-S/16, 224 px", "ViT-B/16, 224 px", "ViT-L/16, 224 px"))
        for v, name in enumerate(names)
    ]
    monkeypatch.setitem(measure.BENCHES, "train", lambda: rows)
    monkeypatch.setenv("COLUMNS", "80")
    out = command(monkeypatch, capsys, "bench", "train")[1]
    assert max(map(len, out.splitlines())) <= 80
    words = set(re.findall(r"[\w/.]+", out))
    assert {f"{value:.4g}" for row in rows for value in row.values() if isinstance(value, float)} <= words
    assert {word for name in names for word in re.findall(r"\w+", name)} <= words
    assert all(out.count(f"bench train: {row['model']}") == 1 for row in rows)


def test_ways_to_read_photographs_are_timed_on_whole_jpegs(monkeypatch, capsys, tmp_path):
    for name, image in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.jpg", "JPEG")):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (300, 300)), image))
    (tmp_path / "c.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:200])
    rows = json.loads(command(monkeypatch, capsys, "bench", "data", "--data", str(tmp_path), "--json")[1])["rows"]
    assert {row["images"] for row in rows} == {1}
    (tmp_path / "b.jpg").unlink()
    assert "has no JPEGs" in refused(monkeypatch, capsys, "bench", "data", "--data", str(tmp_path))


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
