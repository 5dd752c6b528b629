"""Claims about Slurm, before a small one of Python: submitted, preempted between two steps, queued again, finished."""

import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.slurm import SlurmConfig
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import override, to_yaml
from tests.helpers import command, refused

pytest.importorskip("submitit")

SLURM = """
import os, re, signal, socket, subprocess, sys
from pathlib import Path

def sbatch(script):  # runs it beside us, again each time that it was queued again
    job = "41"
    text = Path(script).read_text()
    (home / f"{job}.sh").write_text(text)
    said = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    ranks = int(said["nodes"]) * int(said["ntasks-per-node"])
    about = {"JOB_ID": job, "NTASKS": ranks, "JOB_NUM_NODES": said["nodes"], "JOB_NODELIST": "localhost"}
    env = os.environ | {f"SLURM_{name}": str(value) for name, value in about.items()}
    print("Submitted batch job", job, flush=True)
    if os.fork():
        return
    os.setsid()
    sys.stdout.flush(); null = os.open(os.devnull, os.O_RDWR); [os.dup2(null, n) for n in (0, 1, 2)]
    while True:
        status = subprocess.run(["bash", str(home / f"{job}.sh")], env=env).returncode
        if not (home / f"{job}.again").exists():
            break
        (home / f"{job}.again").unlink()
    (home / "status").write_text(str(status))
    (home / "status").rename(home / f"{job}.done")

def srun(*words):
    words = list(words); files = {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        if name in ("--output", "--error"): files[name] = value or words.pop(0)
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        env = os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        out, err = (open(files[n].replace("%j", "41").replace("%t", str(rank)), "a") for n in ("--output", "--error"))
        tasks.append(subprocess.Popen(words, env=env, stdout=out, stderr=err))
    (home / "tasks").write_text(" ".join(str(t.pid) for t in tasks))
    codes = [t.wait() for t in tasks]
    sys.exit(max(map(abs, codes)))

def scontrol(what, job):
    assert what == "requeue"
    (home / f"{job}.again").touch()
    for pid in (home / "tasks").read_text().split():  # as the real one ends a job that is queued again
        os.kill(int(pid), signal.SIGKILL)

home = Path(os.environ["FAKE_SLURM"])
globals()[Path(sys.argv[0]).name](*sys.argv[1:])
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "slurm"
    home.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (home / name).write_text(f"#!{sys.executable}\n{SLURM}")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return home


def until(what, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return {m["step"]: m["loss"] for m in map(json.loads, lines) if "loss" in m}


def test_a_preempted_job_is_queued_again_and_ends_as_if_nothing_had_been(
    slurm, tiny, folder, tmp_path, monkeypatch, capsys
):
    recipe = override(tiny, {"schedule.epochs": "20", "machine.checkpoint_every": "20"})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    run = tmp_path / "run"
    words = ("pretrain", "--config", str(tmp_path / "recipe.yaml"), "--data", str(folder), "--out", str(run))
    asked = ("--slurm.nodes", "1", "--slurm.gpus_per_node=2", "--slurm.partition", "big", "--slurm.grace_s", "60")
    status, said, _ = command(monkeypatch, capsys, *words, *asked)
    assert status == 0
    assert said.startswith("job 41 submitted: 1 node, 2 processes")
    until(lambda: len(losses(run)) >= 3)
    for pid in (slurm / "tasks").read_text().split():  # as Slurm tells all tasks that their time is over
        os.kill(int(pid), signal.SIGUSR2)
    until(lambda: (slurm / "41.done").exists())
    assert (slurm / "41.done").read_text() == "0", (run / "slurm/41_0_log.err").read_text()[-2000:]
    log = (run / "slurm/41_0_log.out").read_text()
    assert log.count("going on from step") == 1
    assert 0 < int(log.partition("going on from step ")[2].split()[0]) < 100
    assert checkpoints(run)[-1].step == 100
    asked_for = (slurm / "41.sh").read_text()
    for flag in ("--partition=big", "--requeue", "--ntasks-per-node=2", "--gpus-per-node=2", "--signal=USR2@60"):
        assert f"#SBATCH {flag}\n" in asked_for
    pretrain(recipe, str(folder), tmp_path / "plain", Console(quiet=True))
    expected, found = losses(tmp_path / "plain"), losses(run)
    assert expected.keys() == found.keys()
    assert np.allclose([*expected.values()], [*found.values()], rtol=1e-5, atol=0)


def test_mistakes_are_told_before_anything_is_queued(slurm, tiny, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(to_yaml(tiny))
    words = (
        "pretrain",
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "run"),
    )
    assert "did you mean 'slurm.nodes'?" in refused(monkeypatch, capsys, *words, "--slurm.node", "2")
    assert "slurm.nodes" in refused(monkeypatch, capsys, *words, "--slurm.nodes", "0")
    assert "not divisible by 24 processes" in refused(monkeypatch, capsys, *words, "--slurm.nodes", "3")
    assert "optim.lrr" in refused(monkeypatch, capsys, *words, "--slurm.nodes", "1", "--optim.lrr", "1")
    other = ["pretrain", "--config", str(tmp_path / "recipe.yaml"), "--slurm.gpus_per_node", "1", "--data"]
    run, thesis = str(tmp_path / "run"), tmp_path / "thesis"
    assert "no such file or folder" in refused(monkeypatch, capsys, *other, str(tmp_path / "none"), "--out", run)
    assert "larger than the data set of 5" in refused(monkeypatch, capsys, *other, "scenes:5", "--out", run)
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years of work")
    assert "is not a run" in refused(monkeypatch, capsys, *other, str(folder), "--out", str(thesis))
    assert not (tmp_path / "run").exists()
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: big' >&2; exit 1")
    told = refused(monkeypatch, capsys, *words, "--slurm.nodes", "1", "--slurm.partition", "big")
    assert "Slurm does not take the job: sbatch: error: invalid partition specified: big" in told
    monkeypatch.setenv("PATH", "/nowhere")
    assert "run it where jobs are submitted from" in refused(monkeypatch, capsys, *words, "--slurm.nodes", "1")
    assert not list(slurm.glob("41*"))


def test_a_run_that_was_begun_otherwise_is_refused_before_anything_is_queued(
    slurm, tiny, folder, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    pretrain(tiny, str(folder), run, Console(quiet=True))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    words = ["pretrain", "--out", str(run), "--slurm.gpus_per_node", "1"]
    assert "optim.lr: 0.001 -> 0.002" in refused(monkeypatch, capsys, *words, "--optim.lr", "2e-3")
    assert "was made from other images" in refused(monkeypatch, capsys, *words, "--data", "scenes:40")
    assert "raise schedule.epochs" in refused(monkeypatch, capsys, *words, "--schedule.epochs", "1")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    assert not list(slurm.glob("41*"))


def test_help_says_what_every_option_means(monkeypatch, capsys):
    status, said, _ = command(monkeypatch, capsys, "pretrain", "--help")
    assert status == 0
    for option in fields(SlurmConfig):
        (line,) = (line for line in said.splitlines() if line.split()[:1] == [f"--slurm.{option.name}"])
        assert len(line.split()) > 1
        if isinstance(option.default, int | float):
            assert line.endswith(f"({option.default:g})")


def test_on_the_cpu_there_is_one_process_a_node():
    assert SlurmConfig(nodes=3, gpus_per_node=0).processes == 3
    assert SlurmConfig(nodes=3).processes == 24
