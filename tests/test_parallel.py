"""Claims about several processes: their number changes nothing, and whatever happens to one, one clear error ends the job."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from openjepa.data.augment import AugmentConfig
from openjepa.data.sources import open_source
from openjepa.data.stream import DataConfig, Steps, Views, share
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import read_metrics
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig, sample_share
from openjepa.recipes.recipe import Recipe, override, to_yaml
from tests.helpers import same

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:openjepa"}

RUNS = """
import sys
from rich.console import Console
from openjepa.engine.launch import joined
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe, from_dict, override
import yaml
recipe = from_dict(Recipe, yaml.safe_load(open(sys.argv[1])))
data, out = sys.argv[2:4]
with joined():
    for name, values in {runs}:
        pretrain(override(recipe, values), data, f"{{out}}/{{name}}", Console(quiet=True))
"""


def launch(ranks: int, code: str, tmp: Path, *words: object, wait: bool = True) -> subprocess.Popen:
    """torchrun of a program, on so many processes; its output is read when it has ended."""
    program = tmp / "program.py"
    program.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*torchrun, str(program), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    if wait:
        process.out, process.err = process.communicate(timeout=400)  # type: ignore[attr-defined]
    return process


def losses(run: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(run) if "loss" in m]


SHORT = {"schedule.epochs": "4", "schedule.warmup_epochs": "0.5"}
DROPPING = {"model.drop_path": "0.5", "schedule.epochs": "2", "schedule.warmup_epochs": "0.5"}
MAE = {"method": "mae", "mae.decoder_width": "16", "mae.decoder_depth": "1", "mae.decoder_heads": "2", **SHORT}
IBOT = {"method": "ibot", "ibot.prototypes": "32", "ibot.hidden": "16", "ibot.bottleneck": "8", "crops.small": "2",
        "crops.small_size": "16,16", "ibot.norm_last_layer": "false", "optim.clip_each": "0.3", **SHORT}  # fmt: skip


@pytest.fixture(scope="module")
def fifty() -> Recipe:
    from tests.conftest import TINY

    values = {"schedule.epochs": "10", "monitors.knn_every": "10", "optim.accumulate": "2", "machine.keep": "9"}
    from openjepa.recipes.recipe import from_dict

    return override(from_dict(Recipe, TINY), values)


@pytest.fixture(scope="module")
def many(fifty, folder, tmp_path_factory) -> Path:
    """Fifty steps of one recipe on 1, 2 and 4 ranks, and one run that goes from each to another."""
    out = tmp_path_factory.mktemp("ranks")
    config = out / "recipe.yaml"
    config.write_text(to_yaml(fifty))
    fsdp = {"machine.strategy": "fsdp", "machine.recompute": "selective"}
    methods = {"mae": MAE, "ibot": IBOT, "unit": {**IBOT, "ibot.norm_last_layer": "true"}}  # prototypes of length 1
    alone = [(f"{name}-1", values) for name, values in methods.items()]
    together = [
        (f"{name}-{how['machine.strategy']}", values | how)
        for name, values in methods.items()
        for how in (fsdp, {"machine.strategy": "ddp"})
    ]
    plans = [
        (1, 0, [("one", {}), ("full", {"machine.recompute": "full"}), ("dropping-1", DROPPING), *alone]),
        (2, 15, [("ddp-2", {}), ("fsdp-2", fsdp), ("moved", {}), ("dropping-2", DROPPING), *together]),
        (4, 30, [("ddp-4", {}), ("fsdp-4", {**fsdp, "machine.recompute": "full"}), ("moved", fsdp)]),
        (1, 40, [("moved", {})]),
    ]
    for ranks, stopped, runs in plans:
        if stopped:  # as if it had been, there
            moved = out / "moved"
            if not moved.exists():
                shutil.copytree(out / "one", moved)
            for newer in [c for c in checkpoints(moved) if c.step > stopped]:
                shutil.rmtree(newer.path)
        done = launch(ranks, RUNS.format(runs=runs), out, config, folder, out)
        assert done.returncode == 0, done.err[-3000:]
    return out


@pytest.mark.parametrize("name", ["full", "ddp-2", "fsdp-2", "ddp-4", "fsdp-4", "moved"])
def test_the_number_of_ranks_and_the_strategy_change_no_loss(many, name):
    expected, found = losses(many / "one"), losses(many / name)
    assert len(expected) == len(found) == 50
    assert np.allclose(expected, found, rtol=1e-5, atol=0)


def test_every_checkpoint_of_any_ranks_is_one_encoder(many):
    reference = checkpoints(many / "one")[-1].weights()
    for name in ("ddp-2", "fsdp-2", "fsdp-4", "moved"):
        found = checkpoints(many / name)[-1].weights()
        assert found.keys() == reference.keys()
        for (
            key,
            expected,
        ) in reference.items():  # AdamW's first steps divide by gradients near 0: sums' order shows there
            assert torch.allclose(found[key], expected, rtol=1e-3, atol=1e-4), (name, key)
    assert len(list(checkpoints(many / "fsdp-4")[-1].path.glob("weights-*.safetensors"))) == 4


def test_the_same_branches_are_dropped_on_any_number_of_ranks(many):
    one, two = (checkpoints(many / name)[-1].weights() for name in ("dropping-1", "dropping-2"))
    plain = checkpoints(many / "one")[1].weights()  # of the same step
    apart = max((one[key] - two[key]).abs().max().item() for key in one)
    assert apart < 1e-5
    assert max((one[key] - plain[key]).abs().max().item() for key in one) > 1e-3  # it does drop


def but_keys(name: str, weights: torch.Tensor) -> torch.Tensor:
    """Without the biases of keys: no softmax sees them, so their gradients are rounding, which AdamW makes whole steps of."""
    return torch.cat(weights.chunk(3)[::2]) if name.endswith("qkv.bias") else weights


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["mae", "ibot", "unit"])
def test_nor_do_they_change_what_another_method_learns(many, method, strategy):
    """iBOT's teacher and the centres of its logits, means over the images of all ranks, among it."""
    alone, together = many / f"{method}-1", many / f"{method}-{strategy}"
    assert len(losses(alone)) == 20
    assert np.allclose(losses(alone), losses(together), rtol=1e-5, atol=0)
    reference, found = (checkpoints(run)[-1].weights() for run in (alone, together))
    assert found.keys() == reference.keys()
    assert {"centres", "target_head.mlp.0.weight"} <= found.keys() or method == "mae"
    for key, expected in reference.items():
        assert torch.allclose(but_keys(key, found[key]), but_keys(key, expected), rtol=0, atol=1e-5), key
    if method != "mae":
        assert reference["centres"].abs().min(1).values.max() > 0  # both kinds moved


def test_folders_that_are_not_shared_are_refused(fifty, folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(to_yaml(fifty))
    code = (
        "import os, sys\nfrom openjepa.cli import main\n"
        "sys.argv += ['--out', sys.argv.pop() + os.environ['RANK']]\nmain()"
    )
    words = ("pretrain", "--config", tmp_path / "recipe.yaml", "--data", folder, tmp_path / "own")
    done = launch(2, code, tmp_path, *words)
    assert done.returncode != 0
    assert len(said(done.err)) == 1
    assert "is not the same folder for all processes (rank 1 sees another)" in said(done.err)[0]


@pytest.mark.parametrize("context", ["even", "packed"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_very_batch_of_one(folder, ranks, context):
    source = open_source(str(folder))

    def batch(which: np.ndarray | None):
        masks = partial(sample_share, MaskingConfig(context=context), (8, 8))
        views = Views((AugmentConfig(),), (32, 32), 3, masks)
        return Steps(source, DataConfig(batch_size=16), views, 0, which).batch(3)

    whole = batch(None)
    for part in range(2):
        for rank in range(ranks):
            slots = share(16, 2, rank, ranks)
            mine = batch(slots)
            assert torch.equal(mine.images, whole.images[slots])
            assert np.array_equal(mine.indices, whole.indices[slots])
            assert torch.equal(mine.masks.context, whole.masks.context[slots])
            assert torch.equal(mine.masks.targets, whole.masks.targets[slots])
        together = np.concatenate([np.split(share(16, 2, rank, ranks), 2)[part] for rank in range(ranks)])
        assert sorted(together) == list(range(8 * part, 8 * part + 8))  # the same parts on any number of ranks


def test_a_batch_that_cannot_be_shared_out_is_refused_with_the_next_that_can():
    with pytest.raises(UserError, match=r"not divisible by 3 processes x optim.accumulate 2: the next that is is 12"):
        share(8, 2, 0, 3)


# ---------------------------------------------------------------- faults

FAULTY = """
import os, sys, time
from openjepa import cli
from openjepa.engine import launch
launch.TICK = 0.1
launch.GRACE = 1.0
rank, fault = int(os.environ["RANK"]), sys.argv.pop(1)
begin = launch.Roll.begin
def meet(self, step):
    if step == 7 and rank == 1:
        while not os.path.exists(sys.argv[sys.argv.index("--out") + 1] + "/checkpoints/step-00000005"): time.sleep(0.05)
        if fault == "raise": raise ValueError("a fault of rank 1")
        if fault == "kill": os.kill(os.getpid(), 9)
        if fault == "hang": time.sleep(1000)
        if fault == "term": os.kill(os.getpid(), 15)
    begin(self, step)
launch.Roll.begin = meet
if fault == "bad":
    from openjepa.methods.ijepa import IJEPA
    forward, seen = IJEPA.forward, []
    def odd(self, images, masks, small=None):
        seen.append(1)
        if rank == 1 and len(seen) in (4, 6, 7):
            images = images.clone(); images[1] = float("nan")
        return forward(self, images, masks)
    IJEPA.forward = odd
cli.main()
"""


def faulty(fault: str, tiny: Recipe, folder: Path, tmp: Path, **values: str) -> tuple[subprocess.Popen, float]:
    config = tmp / "recipe.yaml"
    config.write_text(to_yaml(override(tiny, {"schedule.epochs": "4", **values})))
    start = time.monotonic()
    words = ("pretrain", "--config", config, "--data", folder, "--out", tmp / "run")
    return launch(2, FAULTY, tmp, fault, *words), time.monotonic() - start


def said(errors: str) -> list[str]:
    """What the processes themselves said, without torchrun's own report."""
    return [line for line in errors.splitlines() if line.startswith("openjepa: ")]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("kill", "openjepa: rank 1 is gone (killed?), the others were in step 7: the same command goes on"),
        (
            "hang",
            "openjepa: rank 1 hangs: the others have waited for it in step 7 for 20 s (machine.patience_s); the same",
        ),
    ],
)
def test_a_rank_that_vanishes_or_hangs_is_named(tiny, folder, tmp_path, fault, told):
    done, _ = faulty(fault, tiny, folder, tmp_path, **{"machine.patience_s": "20"})
    assert done.returncode != 0
    assert len(said(done.err)) == 1
    assert said(done.err)[0].startswith(told)
    assert checkpoints(tmp_path / "run")[-1].step == 5


def test_a_rank_that_fails_ends_the_job_with_its_own_error_alone(tiny, folder, tmp_path):
    done, _ = faulty("raise", tiny, folder, tmp_path)
    assert done.returncode != 0
    assert done.err.count("ValueError: a fault of rank 1") == 1
    assert "[rank0]" not in done.err
    assert "gloo" not in done.err.lower()


def test_a_signal_to_one_rank_stops_all_after_one_step_with_a_checkpoint(tiny, folder, tmp_path):
    done, _ = faulty("term", tiny, folder, tmp_path)
    assert "stopped: checkpoint of step 8 written" in done.err
    assert "exitcode  : 75" in done.err  # torchrun's report of what its processes ended with
    assert 'Traceback (most recent call last):\n  File "<frozen' not in done.err.split("torch/distributed")[0]
    assert checkpoints(tmp_path / "run")[-1].step == 8


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tiny, folder, tmp_path):
    done, _ = faulty("bad", tiny, folder, tmp_path, **{"monitors.max_bad_steps": "3"})
    assert done.returncode == 0, done.err[-3000:]
    lines = [line.split("\t") for line in (tmp_path / "run" / "bad_steps.txt").read_text().splitlines()]
    assert [int(step) for step, *_ in lines] == [4, 6, 7]
    assert all(len(names.split(", ")) == 1 for *_, names in lines)  # the one image, by its file's name
    assert all(names.endswith(".png") for *_, names in lines)
    last = checkpoints(tmp_path / "run")[-1]
    assert last.state()["skipped_steps"] == 3
    assert {float(v) for k, v in last.optimizer().items() if k.endswith("/step")} == {17.0}
    assert all(v.isfinite().all() for v in last.weights().values())


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_very_weights_of_one_never_killed(tiny, folder, tmp_path):
    """SIGKILL to one of two ranks, at any moment of training or of a checkpoint's writing."""
    chance = random.Random(0)
    values = {"schedule.epochs": "40", "machine.checkpoint_every": "0.2", "monitors.knn_every": "10"}
    (tmp_path / "recipe.yaml").write_text(to_yaml(override(tiny, values)))
    words = ("pretrain", "--config", tmp_path / "recipe.yaml", "--data", folder, "--out")

    def begin(out: Path, wait: bool) -> subprocess.Popen:
        return launch(2, "from openjepa.cli import main; main()", tmp_path, *words, out, wait=wait)

    kills, moments = 0, []
    while kills < 20:
        process, run = begin(tmp_path / "killed", wait=False), tmp_path / "killed"
        seen, goal = len(losses(run)), len(losses(run)) + chance.randint(1, 12)
        while len(losses(run)) < min(goal, 199) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.random() / 20)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if len(ranks) == 2 and process.poll() is None:
            os.kill(int(ranks[chance.randrange(2)]), signal.SIGKILL)
            kills += 1
            moments.append((len(losses(run)), seen))
        _, err = process.communicate(timeout=400)
        assert process.returncode, "it was not killed"
        assert "SIGKILL" in err
    last = begin(tmp_path / "killed", wait=True)
    assert last.returncode == 0, last.err[-2000:]
    assert begin(tmp_path / "plain", wait=True).returncode == 0
    killed, plain = (checkpoints(tmp_path / name)[-1] for name in ("killed", "plain"))
    assert killed.step == plain.step == 200
    assert same(killed.weights(), plain.weights())
    assert same(killed.optimizer(), plain.optimizer())
    assert losses(tmp_path / "killed") == losses(tmp_path / "plain")
    print(f"killed after steps {[step for step, _ in moments]}")


def test_user_mistakes_are_told_once_whatever_the_number_of_ranks(tiny, folder, tmp_path):
    done, _ = faulty("none", tiny, folder, tmp_path, **{"data.batch_size": "9"})
    assert len(said(done.err)) == 1
    assert "data.batch_size 9 is not divisible by 2 processes" in said(done.err)[0]
