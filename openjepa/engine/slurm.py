"""The same command as a job of Slurm's: submitted by submitit, stopped between two steps when its time is over, queued again."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from openjepa.errors import UserError, first_line, needs


def option(value: Any, meaning: str) -> Any:
    """A field, its default and what --help says of it."""
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What to ask Slurm for, in the words of sbatch. Changes no result."""

    nodes: int = option(1, "machines")
    gpus_per_node: int = option(8, "one process each; 0: one process a node, on its CPU")
    cpus_per_task: int = option(12, "cores of a process and its workers")
    hours: float = option(24.0, "after which, as after a preemption, the job is queued again and goes on")
    grace_s: int = option(120, "seconds between the signal and the end: a step and a checkpoint must fit in")
    partition: str | None = option(None, "which machines, by Slurm's name for them")
    account: str | None = option(None, "who pays")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that the machines must have")
    exclude: str | None = option(None, "machines that are left out")
    mem: str | None = option(None, "of a machine, such as 900G")
    setup: tuple[str, ...] = option((), "shell commands before the start, such as 'module load cuda'")

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0 or self.cpus_per_task < 1:
            raise UserError(
                "slurm.nodes and slurm.cpus_per_task must be at least 1, slurm.gpus_per_node at least 0 (then on the CPU)"
            )
        if self.hours <= 0 or self.grace_s < 1:
            raise UserError("slurm.hours must be above 0, slurm.grace_s at least 1")

    @property
    def processes(self) -> int:
        return self.nodes * max(1, self.gpus_per_node)


def described() -> str:
    """A line for each option, with its default."""
    lines = []
    for each in fields(SlurmConfig):
        default = f" ({each.default:g})" if isinstance(each.default, int | float) else ""
        lines.append(f"  --slurm.{each.name:14} {each.metadata['meaning']}{default}")
    return "\n".join(lines)


class Job:
    """What every process of the job runs: a command of openjepa, after it has learned who the others are."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __call__(self) -> None:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        from openjepa import cli
        from openjepa.engine.run import REQUEUE

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.argv = ["openjepa", *self.words]
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code != REQUEUE:
                raise
            if (
                os.environ["RANK"] == "0"
            ):  # the others end well: a bad exit of theirs would end this one before it is done
                subprocess.run(["scontrol", "requeue", JobEnvironment().job_id], check=True)

    def checkpoint(self) -> Any:
        """For submitit, where a signal comes before training begins: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(words: list[str], config: SlurmConfig, folder: Path) -> str:
    """Submit a command of openjepa. folder: for its logs, on a disk that all nodes share. Returns the job's number.

    Raises UserError where there is no Slurm, or it refuses.
    """
    with needs("slurm"):
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise UserError(
            "--slurm needs Slurm's sbatch and srun, which are not here: run it where jobs are submitted from"
        )
    asked = {k: v for k, v in asdict(config).items() if v is not None}
    minutes, grace, setup = round(60 * asked.pop("hours")), asked.pop("grace_s"), asked.pop("setup")
    if not asked["gpus_per_node"]:
        del asked["gpus_per_node"]
    try:
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(
            job_name="openjepa",
            ntasks_per_node=config.processes // config.nodes,
            time=max(1, minutes),
            signal_delay_s=grace,
            setup=list(setup),
            additional_parameters={"requeue": True},  # after a node has failed, too
            srun_args=["--kill-on-bad-exit=1"],
            **asked,
        )
        with contextlib.redirect_stderr(io.StringIO()):  # where submitit repeats what sbatch says
            return str(executor.submit(Job(words)).job_id)
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
        raise UserError(f"Slurm does not take the job: {first_line(error)}") from error
