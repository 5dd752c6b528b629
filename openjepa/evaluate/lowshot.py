"""Few labels: a share of each class, logistic regression on the frozen features, several draws (paper, table 2).

The regularisation is chosen by cross-validation within the few labels, as a user who has no more of them must. Features
are standardised by the few images and rotated into their span, which changes no prediction of an L2-regularised regression.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from openjepa.data.sources import Source
from openjepa.errors import UserError
from openjepa.evaluate.features import Features, short_hash
from openjepa.evaluate.finetune import FinetuneConfig
from openjepa.evaluate.linear import Standard, feature_set
from openjepa.rng import permutation

SMALL = 2000  # labels below which threads cost the regression more than they bring


@dataclass(frozen=True, kw_only=True)
class LowShotConfig:
    """Which labels, and how they are learned from.

    share: of each class's images. per_class: images of each class, instead. lists: files that name the images, a draw each,
    such as SimCLR's 1percent.txt. methods: linear and finetune, of which the better mean is reported. cs: inverse
    regularisations C as scikit-learn has them, which multiply the sum of the losses.
    """

    share: float = 0.01
    per_class: int | None = None
    lists: tuple[str, ...] = ()
    methods: tuple[Literal["linear", "finetune"], ...] = ("linear",)
    draws: int = 3
    features: tuple[str, ...] = ("last", "concat4")
    cs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    folds: int = 5
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or (self.per_class is not None and self.per_class < 1) or self.draws < 1:
            raise UserError("lowshot: share is above 0 and at most 1, per_class and draws are at least 1")
        if not self.methods or not self.features or not self.cs or min(self.cs) <= 0 or self.folds < 2:
            raise UserError(
                "lowshot: methods, features and cs need one value at least, cs are above 0, folds at least 2"
            )

    @property
    def contents(self) -> list[str]:
        """Of the lists, which their names do not tell."""
        return [short_hash(names_in(Path(file))) for file in self.lists]


RECIPES = {
    "1%": LowShotConfig(),
    "10%": LowShotConfig(share=0.1),
    "paper": LowShotConfig(methods=("linear", "finetune")),  # table 2: the better of both
}


def draws(config: LowShotConfig, source: Source, labels: Tensor, seed: int) -> list[np.ndarray]:
    """The rows of each draw, sorted. Raises UserError for lists that name images the source does not have."""
    if config.lists:
        number = numbered(source)
        return [listed(Path(file), number) for file in config.lists]
    return [drawn(config, labels.numpy(), seed, draw) for draw in range(config.draws)]


def drawn(config: LowShotConfig, labels: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """A share, or so many, of each class: at least one, chosen by (seed, draw)."""
    order = permutation(seed, "low-shot", draw, len(labels))
    chosen = []
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        chosen.append(mine[: config.per_class or max(1, round(config.share * len(mine)))])
    return np.sort(np.concatenate(chosen))


def numbered(source: Source) -> dict[str, int]:
    """Every image's place by its name, and by its file's name alone where no other has the same."""
    names = [source.name(i) for i in range(len(source))]
    alone = Counter(map(os.path.basename, names))
    short = {base: i for i, name in enumerate(names) if alone[base := os.path.basename(name)] == 1}
    return short | {name: i for i, name in enumerate(names)}


def names_in(file: Path) -> list[str]:
    """The lines of a list. Raises UserError."""
    try:
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"lowshot.lists {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"lowshot.lists {file} is not text") from error
    if not names:
        raise UserError(f"lowshot.lists {file} names no image")
    return names


def listed(file: Path, number: dict[str, int]) -> np.ndarray:
    """The rows that a file names, one a line, as SimCLR's 1percent.txt does."""
    names = names_in(file)
    if missing := [name for name in names if name not in number]:
        raise UserError(
            f"lowshot.lists {file}: {len(missing)} of {len(names)} images are not in --train, as '{missing[0]}'"
        )
    return np.unique([number[name] for name in names])


def logistic(config: LowShotConfig, train: Features, labels: Tensor, rows: np.ndarray,
             test: Features) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Choose feature set and C within the few labels, fit on all of them, predict the test set once.

    Returns int64 [m] and the choice, whose validation accuracy is None where every class has one label alone.
    """
    y = labels[rows].numpy()
    if len(np.unique(y)) < 2:
        raise UserError("lowshot: the few labels are of one class: raise share or per_class, or name others in lists")
    names = [name for name in config.features if name == "last" or train.values.shape[1] > 1]
    standards = {name: Standard(train, rows, name) for name in names}

    def seen(features: Features, some: np.ndarray | slice, name: str) -> np.ndarray:
        return standards[name](feature_set(features.rows(some), name)).numpy()

    known = {name: seen(train, rows, name) for name in names}
    folds = min(config.folds, int(np.unique(y, return_counts=True)[1].max()))
    settings = list(itertools.product(names, config.cs))
    score, name, c = None, names[0], config.cs[len(config.cs) // 2]  # where every class has one label alone
    with threadpool_limits(1 if len(rows) < SMALL else None), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer labels than folds, or one alone
        if folds > 1:
            kfold = StratifiedKFold(folds, shuffle=True, random_state=0)
            scores = [
                float(cross_val_score(model(c), known[name], y, cv=kfold, error_score=0.0).mean())
                for name, c in settings
            ]
            score, (name, c) = max(scores), settings[int(np.argmax(scores))]
        fitted = model(c).fit(known[name], y)
    starts = range(0, len(test), 8192)
    parts = [fitted.predict(seen(test, slice(start, start + 8192), name)) for start in starts]
    return torch.from_numpy(np.concatenate(parts)), {"features": name, "c": c, "validation_accuracy": score}


def model(c: float) -> LogisticRegression:
    """L2-regularised multinomial logistic regression."""
    return LogisticRegression(C=c, max_iter=1000)
