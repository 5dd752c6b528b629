"""Linear probe: logistic regression on frozen features, many heads in one pass (appendix A, linear evaluation).

Heads differ in feature set (last layer, last four concatenated), learning rate and weight decay. They are chosen on a
validation part of the training set; the chosen one is then fitted on all of it and sees the test set once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openjepa.errors import UserError
from openjepa.rng import permutation

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DECAYS = (0.0, 5e-4)
BATCH = 256
EPOCHS, STEPS = 30, 2000  # trains for whichever is longer
VALIDATION = 0.2  # share of the training set that chooses the head


@dataclass(frozen=True)
class Head:
    """One setting of the sweep."""

    features: str  # last or concat4
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class LinearResult:
    """accuracy: of the chosen head on the test set; sweep: every head's on the validation part."""

    accuracy: float
    chosen: Head
    sweep: list[tuple[Head, float]]


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int,
                 seed: int = 0) -> LinearResult:  # fmt: skip
    """train [n, layers, D], test [m, layers, D]: pooled features, the last layer last. Labels int64."""
    if len(train) < 2:
        raise UserError("the linear probe needs two labelled training images or more")
    order = torch.from_numpy(permutation(seed, "probe validation", 0, len(train)))
    held = max(1, round(VALIDATION * len(train)))
    validation, fitting = order[:held], order[held:]
    sweep: list[tuple[Head, float]] = []
    for name, (x, _) in feature_sets(train, test).items():
        heads = [Head(name, lr, wd) for lr, wd in itertools.product(RATES, DECAYS)]
        known, unseen = standardise(x[fitting], x[validation])
        weights, bias = fit(known, train_labels[fitting], classes, heads, seed)
        scores = accuracies(unseen, train_labels[validation], weights, bias, classes)
        sweep += list(zip(heads, scores, strict=True))
    chosen = max(sweep, key=lambda entry: entry[1])[0]
    known, unseen = standardise(*feature_sets(train, test)[chosen.features])
    weights, bias = fit(known, train_labels, classes, [chosen], seed)
    return LinearResult(accuracies(unseen, test_labels, weights, bias, classes)[0], chosen, sweep)


def feature_sets(train: Tensor, test: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The paper's two: average-pooled last layer, and the last four concatenated."""
    sets = {"last": (train[:, -1], test[:, -1])}
    if train.shape[1] > 1:
        sets["concat4"] = (train.flatten(1), test.flatten(1))
    return sets


def standardise(known: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets by the mean and deviation of `known`: the probe's batch norm, without its noise.

    With more dimensions than samples both are then rotated into the span of `known`. Gradient descent from zero never
    leaves that span and does not notice a rotation, so the probe is the same and costs less.
    """
    mean, std = known.mean(0), known.std(0, correction=0).clamp(min=1e-6)
    known, unseen = (known - mean) / std, (unseen - mean) / std
    if known.shape[1] > len(known):
        basis, _ = torch.linalg.qr(known.T)
        known, unseen = known @ basis, unseen @ basis
    return known, unseen


def fit(x: Tensor, labels: Tensor, classes: int, heads: list[Head], seed: int) -> tuple[Tensor, Tensor]:
    """Train all heads at once, as one wide matrix, by SGD with Nesterov momentum and a cosine to zero.

    x: [n, D], standardised. Returns weights [D, heads * classes] and biases [heads * classes].
    """
    n, d = x.shape
    lr = torch.tensor([h.lr for h in heads]).repeat_interleave(classes)
    decay = torch.tensor([h.weight_decay for h in heads]).repeat_interleave(classes)
    weights, bias = torch.zeros(d, len(lr)), torch.zeros(len(lr))
    velocity = [torch.zeros_like(weights), torch.zeros_like(bias)]
    one_hot = F.one_hot(labels, classes).float()
    batch = min(BATCH, n)
    epochs = max(EPOCHS, math.ceil(STEPS / (n // batch)))
    steps, step = epochs * (n // batch), 0
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(seed, "probe order", epoch, n))
        for index in order[: n // batch * batch].split(batch):
            xb = x[index]
            probabilities = (xb @ weights + bias).unflatten(-1, (len(heads), classes)).softmax(-1)
            error = (probabilities - one_hot[index, None]).flatten(1) / batch  # [B, heads * classes]
            error = F.hardshrink(error, 1e-9)  # what is learned leaves denormal numbers, which CPUs multiply slowly
            gradients = (xb.T @ error + decay * weights, error.sum(0))
            rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            for parameter, gradient, v in zip((weights, bias), gradients, velocity, strict=True):
                v.mul_(0.9).add_(gradient)
                parameter.sub_(rate * (gradient + 0.9 * v))
            step += 1
    return weights, bias


def accuracies(x: Tensor, labels: Tensor, weights: Tensor, bias: Tensor, classes: int) -> list[float]:
    """Top-1 of every head."""
    correct = torch.zeros(len(bias) // classes)
    for xb, yb in zip(x.split(4096), labels.split(4096), strict=True):
        predictions = (xb @ weights + bias).unflatten(-1, (-1, classes)).argmax(-1)  # [B, heads]
        correct += (predictions == yb[:, None]).sum(0)
    return [float(c) / len(labels) for c in correct]
