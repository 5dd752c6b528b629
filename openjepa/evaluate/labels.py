"""Accuracy against the number of labels: a pretrained encoder beside the same network trained from scratch on the labels.

Three learners get the same labels, and each sees the test set once:

- fine-tuned: `finetune` from the pretrained weights;
- linear probe: `linear` on the features of the frozen encoder;
- from scratch: `finetune`, the same code with the same images, from random weights, and with what those need: no decay of
  the rate over layers, since no layer holds anything yet that slow rates would keep; a rate of 1e-3, the usual one of AdamW
  for ViTs; gradients clipped to a norm of 1; and twice the steps. What pretraining cost is not counted: `--scratch-steps`
  gives that time to the labels, too.

Where several rates are to be tried, each of the two that train the network chooses its own, for each share, on a fifth of
the first draw's labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from openjepa.errors import UserError
from openjepa.evaluate import finetune, linear, lowshot
from openjepa.evaluate.features import Features, Images
from openjepa.evaluate.finetune import FinetuneConfig
from openjepa.evaluate.linear import LinearConfig
from openjepa.evaluate.protocols import finetuned
from openjepa.evaluate.scores import Answer, accuracy
from openjepa.evaluate.subjects import Bench, Subject, Task

FINETUNED, PROBED, SCRATCH = LEARNERS = ("fine-tuned", "linear probe", "from scratch")
LONGER = 2  # times as many steps from scratch

# small: for networks of some million parameters on CPUs, where RandAugment's distortions need longer training than there is.
# Its rate: of an encoder after 1,106 steps of ijepa_cifar10_cpu, 500 labels, 2,000 other training images, one draw: 5e-4 gave
# 27.1 %, 1.5e-3 30.7 %.
RECIPES = {"small": FinetuneConfig(epochs=1, batch_size=64, lr=1.5e-3, randaug="", clip_norm=1.0), **finetune.RECIPES}


def from_scratch(config: FinetuneConfig) -> FinetuneConfig:
    """What random weights get where pretrained ones are fine-tuned so."""
    return replace(config, epochs=LONGER * config.epochs, lr=1e-3, per_256=False, layer_decay=1.0, clip_norm=1.0)


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """How each learner learns.

    min_steps: of fine-tuning, where the epochs of few labels hold fewer; from scratch twice as many. scratch_steps: from scratch
    at least, at every share. rates: factors of the learning rates of both; the best is chosen where there are several.
    """

    finetune: FinetuneConfig
    scratch: FinetuneConfig
    linear: LinearConfig
    min_steps: int = 1000
    scratch_steps: int = 0
    rates: tuple[float, ...] = (1.0,)
    validation: float = 0.2  # share of the labels that chooses among rates

    def __post_init__(self) -> None:
        if (
            min(self.min_steps, self.scratch_steps) < 0
            or not self.rates
            or not all(0 < rate < math.inf for rate in self.rates)
            or not 0 < self.validation < 1
        ):
            raise UserError(
                "labels: numbers of steps must not be negative, rates are above 0, validation between 0 and 1"
            )
        if self.linear.views != "none":
            raise UserError("labels: linear.views must be none: all shares learn from one set of features")


def draws(task: Task, bench: Bench, share: float, count: int) -> list[np.ndarray]:
    """The rows of each draw of a share of every class, as low-shot has them; all rows, once, for 1.

    Raises UserError for a share that leaves a class without an image.
    """
    labels = task.labels[0]
    found, counts = np.unique(labels.numpy(), return_counts=True)
    least = int(counts.min())
    if round(share * least) < 1:
        name = task.classes[int(found[counts.argmin()])]
        raise UserError(
            f"--labels {percent(share)}: class '{name}' has {least} images, of which that is none: "
            f"{percent(math.ceil(1e4 / least) / 1e4)} is one"
        )
    config = lowshot.LowShotConfig(share=share, draws=1 if share == 1 else count)
    return lowshot.draws(config, bench.train, labels, bench.seed)


@dataclass(frozen=True)
class Contest:
    """The learners before one task. pretrained, random: the same network with both weights."""

    config: LabelsConfig
    pretrained: Subject
    random: Subject
    task: Task
    bench: Bench

    def ask(self, who: str, rows: np.ndarray, rate: float = 1.0,
            say: Callable[[str], None] = lambda line: None) -> Answer:  # fmt: skip
        """Learn from some of the labels, and be scored on the test set. rate: a factor of the learning rate."""
        labels, expected = self.task.labels
        classes = len(self.task.classes)
        if who != PROBED:
            return accuracy(self.trained(who, rows, rate, say=say), expected, classes)
        features = self.pretrained.train
        some = Features(features.values[rows], features.hashes[rows]) if len(rows) < len(features) else features
        half, seed = self.bench.precision == "bf16", self.bench.seed
        probe = linear.Probe(self.config.linear, some, labels[rows], classes, self.bench.device, half, seed)
        return accuracy(probe.run(self.pretrained.test).predictions, expected, classes)

    def choose(self, who: str, rows: np.ndarray) -> list[tuple[float, float]]:
        """Every rate with its accuracy on a part of the labels that it did not learn from."""
        fitting, held = linear.split(len(rows), self.config.validation, self.bench.seed)
        images = Images(self.bench.train, rows[held], self.bench.view)
        expected = self.task.labels[0][rows[held]]
        found = {rate: self.trained(who, rows[fitting], rate, images) for rate in self.config.rates}
        return [(rate, float((predicted == expected).float().mean())) for rate, predicted in found.items()]

    def trained(self, who: str, rows: np.ndarray, rate: float, images: Images | None = None,
                say: Callable[[str], None] = lambda line: None) -> Tensor:  # fmt: skip
        """What the whole network makes of images once it has learned from some rows."""
        config = self.planned(who, len(rows))
        subject = self.random if who == SCRATCH else self.pretrained
        return finetuned(replace(config, lr=rate * config.lr), subject, self.task, self.bench, rows, images, say)

    def planned(self, who: str, labels: int) -> FinetuneConfig:
        """Its values, with so many epochs that the steps are enough."""
        config, least = self.config.finetune, self.config.min_steps
        if who == SCRATCH:
            config, least = self.config.scratch, max(LONGER * least, self.config.scratch_steps)
        per_epoch = labels // min(config.batch_size, labels)
        return replace(config, epochs=max(config.epochs, math.ceil(least / per_epoch)))


def worth(accuracy: float, curve: Sequence[tuple[int, float]]) -> float:
    """How many labels a curve of (labels, accuracy) needs to be as good: between its points by the logarithm of the number.

    Returns 0 or infinity for what lies below or above all of it.
    """
    labels, values = np.array(sorted(curve)).T
    values, first = np.unique(np.maximum.accumulate(values), return_index=True)
    labels = labels[first]  # of a plateau the fewest
    if accuracy < values[0] or accuracy > values[-1]:
        return 0.0 if accuracy < values[0] else math.inf
    return float(np.exp(np.interp(accuracy, values, np.log(labels))))


def percent(share: float) -> str:
    return f"{100 * share:g}%"
