"""Claims about the plan for fleets that nobody here has: its arithmetic, its simulation, and the page that shows both."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openjepa.bench import fleet as bench
from openjepa.bench.fleet import AT_ONCE, INPUTS, JOBS, RESULTS, Job, Step, buckets, measured, plan, simulate, sizes
from openjepa.engine.checkpoint import save
from openjepa.engine.optim import build_optimizer
from openjepa.methods.ijepa import IJEPA
from openjepa.recipes.ijepa import ijepa_scenes
from openjepa.see.figures import SPENT, fleet_figure
from tests.helpers import refused

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
TINY = Job("tiny", ijepa_scenes(), 100_000, 10.0)
STEPS = {n: Step(0.01 + 0.002 * n, 0.01 + 0.004 * n, 0.005) for n in (4, 128)}


@pytest.fixture(scope="module")
def rows():
    return bench.fleet()


def given(monkeypatch, name: str, value: float) -> None:
    monkeypatch.setitem(INPUTS, name, replace(INPUTS[name], value=value))


# ---------------------------------------------------------------- the plan


def test_one_device_needs_no_network(rows):
    for row in rows:
        if row["devices"] == 1:
            assert row["network_gb_per_step"] == row["network_s"] == row["slowest_device_s"] == 0
            assert row["memory_gb"] == row["fsdp_memory_gb"]


def test_more_devices_are_faster_and_never_better_than_their_number(rows):
    for job in JOBS:
        mine = [row for row in rows if row["model"] == job.name and row["batch"] == job.recipe.data.batch_size]
        assert [row["devices"] for row in mine] == [1, 8, 64, 512]
        assert np.all(np.diff([row["images_per_s"] for row in mine]) > 0)
        assert np.all(np.diff([row["efficiency"] for row in mine]) < 0)
    assert max(row["efficiency"] for row in rows) == 1


def test_a_devices_time_is_shared_out_whole(rows):
    for row in rows:
        assert sum(row[part] for part in SPENT) == pytest.approx(row["batch"] / row["images_per_s"])
        assert min(row[part] for part in SPENT) >= 0


def test_the_network_hides_behind_the_backward_pass_but_for_the_last_bucket():
    job = JOBS[0]
    count, each = buckets(sizes(job.recipe).gradient, 64)

    def shown(backward: float) -> float:
        return plan(job, {n: Step(0.1, backward, 0.01) for n in (4, 128)}, 64, 2048)["network_s"]

    assert shown(0) == pytest.approx(count * each)
    assert shown(10) == pytest.approx(each)


def test_a_checkpoint_is_as_large_as_it_is_planned(tmp_path):
    recipe = TINY.recipe
    method = IJEPA(recipe.model, recipe.predictor, recipe.loss)
    optimizer = build_optimizer(method, recipe.optim)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.detach().clone()
    optimizer.step()
    save(tmp_path, 1, method, optimizer, {})
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert written == pytest.approx(sizes(recipe).checkpoint, rel=0.02)  # and names


def test_a_step_keeps_a_bf16_copy_of_what_learns():
    for job in JOBS:
        size = sizes(job.recipe)
        assert size.copies == pytest.approx(2 * size.learning, rel=0.01)
        assert size.activations > 0


def test_memory_is_what_a_gpu_used():
    """A tenth more or less: workspaces, and what the allocator rounds up.

    Of `bench batches` what images add, as its process still held weights of earlier measurements; the whole of a first one.
    """
    found = json.loads(RESULTS.read_text())
    for job in JOBS:
        few, *_, many = (row for row in found["batches"]["rows"] if row["model"] == job.name)
        size = sizes(job.recipe)
        added = (many["peak_memory_gib"] - few["peak_memory_gib"]) * 2**30
        assert size.memory(many["batch"]) - size.memory(few["batch"]) == pytest.approx(added, rel=0.1)
    first = found["train"]["rows"][0]
    assert first["model"].startswith(JOBS[0].name)
    assert sizes(JOBS[0].recipe).memory(first["batch"]) == pytest.approx(first["peak_memory_gib"] * 2**30, rel=0.1)


# ---------------------------------------------------------------- the simulation


def test_plan_and_simulation_agree(rows):
    for row in rows:
        assert row["simulated_images_per_s"] == pytest.approx(row["images_per_s"], rel=0.05)


def test_the_same_seed_plays_the_same():
    first, again, other = (simulate(TINY, STEPS, 64, 2048, played=30, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_no_node_sends_more_than_its_ports_can(rows):
    for row in rows:
        assert row["network_gbit_per_s"] < 8 * INPUTS["network"].value * INPUTS["devices a node"].value
        assert (row["network_gbit_per_s"] > 0) == (row["devices"] > 8)


def test_both_wait_for_a_loader_that_is_slow(monkeypatch):
    given(monkeypatch, "decoding", 0.5)  # images/s of each of 112 cores
    for images_per_s in (plan(TINY, STEPS, 8, 2048)["images_per_s"], simulate(TINY, STEPS, 8, 2048)):
        assert images_per_s == pytest.approx(56, rel=0.05)


def test_both_lose_what_was_not_saved(monkeypatch):
    calm = plan(TINY, STEPS, 64, 2048)
    given(monkeypatch, "time between failures", 64 * 1.5)  # one in 1.5 hours, each half an hour's work
    given(monkeypatch, "restart", 1800)
    failing, played = plan(TINY, STEPS, 64, 2048), simulate(TINY, STEPS, 64, 2048)
    assert failing["images_per_s"] < 0.8 * calm["images_per_s"]
    assert played == pytest.approx(failing["images_per_s"], rel=0.15)  # the plan lets no failure fall into a restart


def test_pauses_stop_all(monkeypatch):
    given(monkeypatch, "pauses", 1.0)  # every device, every step, 50 ms
    paused, planned = (
        2048 / rate for rate in (simulate(TINY, STEPS, 8, 2048), plan(TINY, STEPS, 8, 2048)["images_per_s"])
    )
    assert paused - planned == pytest.approx(0.05, rel=0.1)


# ---------------------------------------------------------------- the page and the command


def tables(rows) -> list[str]:
    """The tables of the page."""

    def table(*lines: str) -> str:
        first, *others = lines
        return "\n".join([first, "|---" * (first.count("|") - 1) + "|", *others])

    def same(model: str) -> str:
        return f"| {model} | {' | '.join(f'{sum(vars(s).values()):.3f}' for s in measured(RESULTS, model).values())} |"

    per_step = measured(RESULTS, JOBS[0].name)
    counted = [(job, sizes(job.recipe)) for job in JOBS]
    return [
        table(
            "| | H100s | batch | images a device | step | images/s | simulated | of linear | all epochs |",
            *(
                f"| {r['model']} | {r['devices']} | {r['batch']:,} | {r['images_per_device']:,g} | {r['step_s']:.3f} s | "
                f"{r['images_per_s']:,.0f} | {r['simulated_images_per_s']:,.0f} | {100 * r['efficiency']:.0f} % | "
                f"{r['days']:.2g} days |"
                for r in rows
            ),
        ),
        table(
            "| | H100s | batch | memory, DDP | FSDP2 | sent a step, DDP | FSDP2 | network of a node | read | decoding | "
            "checkpoint every, takes |",
            *(
                f"| {r['model']} | {r['devices']} | {r['batch']:,} | {r['memory_gb']:.0f} GB | {r['fsdp_memory_gb']:.0f} GB | "
                f"{r['network_gb_per_step']:.1f} GB | {r['fsdp_network_gb_per_step']:.1f} GB | "
                f"{r['network_gbit_per_s']:.0f} Gb/s | {r['read_gb_per_s']:.2g} GB/s | {r['decoding_cores']:.1f} cores | "
                f"{r['checkpoint_every_s']:,.0f} s, {r['checkpoint_s']:.0f} s |"
                for r in rows
            ),
        ),
        table("| | | source |", *(f"| {name} | {i.value:,g} {i.unit} | {i.source} |" for name, i in INPUTS.items())),
        table(f"| seconds of a step | {' | '.join(map(str, per_step))} |", *(same(job.name) for job in JOBS)),
        table(
            "| | parameters that learn, that follow | state | bf16 copies | activations, an image | checkpoint |",
            *(
                f"| {job.name} | {s.learning / 1e6:,.0f} M, {s.following / 1e6:,.0f} M | {s.state / 1e9:.1f} GB | "
                f"{s.copies / 1e9:.1f} GB | {s.activations / 1e6:.0f} MB | {s.checkpoint / 1e9:.1f} GB |"
                for job, s in counted
            ),
        ),
    ]


def filled(page: str, rows) -> str:
    """The page with its tables as the code gives them."""
    made = iter(tables(rows))
    return re.sub(r"(?m)(?:^\|.*\n)+", lambda _: f"{next(made)}\n", page)


def test_the_page_says_what_the_code_says(rows):
    """Write it anew: python -c 'from tests.test_fleet import *; PAGE.write_text(filled(PAGE.read_text(), bench.fleet()))'."""
    page = PAGE.read_text()
    assert filled(page, rows) == page


def test_results_without_steps_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert "openjepa bench batches" in refused(
        monkeypatch, capsys, "bench", "fleet", "--data", str(tmp_path / "other.json")
    )


def test_fleets_are_drawn(rows):
    above, _, below, _ = fleet_figure(rows).axes
    assert [line.get_label() for line in above.lines if len(line.get_xdata()) == 4][1] == "batch 2,048"
    assert len(below.patches) == len(SPENT) * len(rows) / 2


def test_parts_are_no_larger_than_what_was_measured():
    for job in JOBS:
        assert max(measured(RESULTS, job.name)) == AT_ONCE
