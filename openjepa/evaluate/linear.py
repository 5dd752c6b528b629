"""Linear probe: logistic regression on frozen features, many heads in one pass (appendix A, linear evaluation).

Heads differ in feature set (last layer, last four concatenated), normalisation, optimiser, learning rate and weight decay.
They learn from one stream of features, are chosen on a part of the training set that none of them learned from, and the
chosen one alone sees the test set, once. Where training is cheap it is first fitted again on the whole training set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from openjepa.errors import UserError
from openjepa.evaluate.features import Features
from openjepa.rng import key, permutation

IN_MEMORY = 4 * 2**30  # bytes of features that are laid out for training; more are read row by row
CHUNK = 2048  # images whose logits are held at a time
COLUMNS = (
    2048  # heads x classes of one matrix: what outgrows caches and the allocator's own memory is far slower on CPUs
)
MOMENTUM = 0.9
TRUST = 0.001  # LARS's eta
BN_MOMENTUM = 0.1

Norm = Literal["none", "standard", "batch", "batch_plain"]
Batch = dict[str, Tensor]  # by feature set, [B, D]


# ---------------------------------------------------------------- recipes


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """A sweep of heads and how they are trained.

    norms: none; standard (by the training set's mean and deviation); batch (affine batch norm, eps 1e-5); batch_plain
    (without affine part, eps 1e-6). lrs: for 256 images in a batch. decays: weight decays.
    """

    features: tuple[str, ...] = ("last", "concat4")
    norms: tuple[Norm, ...] = ("standard",)
    optimizer: Literal["sgd", "lars"] = "sgd"
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    decays: tuple[float, ...] = (0.0, 5e-4)
    decay_bias: bool = False
    nesterov: bool = True
    batch_size: int = 256
    epochs: int = 30
    min_steps: int = 2000  # trains for whichever is longer
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = ()  # epochs after which the rate falls tenfold; without any, a cosine
    final: float = 0.0  # of the cosine, as a share of the peak
    initial_std: float = 0.0  # of the weights
    views: Literal["none", "crop", "squash"] = (
        "none"  # none: cached features; else augmented images through the encoder
    )
    validation: float = 0.2  # share of the training set that chooses the head
    refit: bool = True  # the chosen head again on all of it

    def __post_init__(self) -> None:
        if not (self.features and self.norms and self.lrs and self.decays):
            raise UserError("linear: features, norms, lrs and decays need one value at least")
        if unknown := set(self.features) - {"last", "concat4"}:
            raise UserError(f"linear.features: unknown '{min(unknown)}': last, concat4 or both")
        if not 0 < self.validation < 1 or self.batch_size < 1 or self.epochs < 1 or min(self.lrs) <= 0:
            raise UserError("linear: validation is between 0 and 1, batch_size, epochs and lrs are above 0")
        if self.views != "none" and "standard" in self.norms:
            raise UserError("linear.norms: 'standard' needs features that are known beforehand: views none")

    @property
    def heads(self) -> list[Head]:
        return [Head(*values) for values in itertools.product(self.features, self.norms, self.lrs, self.decays)]


TRANSFER = LinearConfig(norms=("none", "batch"), lrs=(0.001, 0.01, 0.05, 0.1), decays=(5e-4,), decay_bias=True, epochs=28,
                        min_steps=0, milestones=(8, 16, 24), initial_std=0.01, views="crop", validation=0.1,
                        refit=False)  # fmt: skip

# Protocols, B and D. The papers' rates and ours beside them: the sweep chooses.
RECIPES: dict[str, LinearConfig] = {
    "fast": LinearConfig(),
    "imagenet": LinearConfig(norms=("none", "batch"), optimizer="lars", lrs=(0.001, 0.01, 0.05, 0.1), decays=(0.0, 5e-4),
                             nesterov=False, batch_size=16384, epochs=50, min_steps=0, milestones=(15, 30, 45),
                             initial_std=0.01, views="crop", validation=0.01, refit=False),
    "mae": LinearConfig(features=("last",), norms=("batch_plain",), optimizer="lars", lrs=(0.1,), decays=(0.0,),
                        nesterov=False, batch_size=16384, epochs=90, min_steps=0, warmup_epochs=10, initial_std=0.01,
                        views="crop", validation=0.01, refit=False),
    "transfer": TRANSFER,  # CIFAR-100's
    "places205": replace(TRANSFER, epochs=14, milestones=(4, 8, 12)),
    "inat18": replace(TRANSFER, epochs=84, milestones=(24, 48, 72)),
    "clevr_count": replace(TRANSFER, epochs=50, milestones=(), final=0.01, views="squash"),
    "clevr_dist": replace(TRANSFER, epochs=100, milestones=(), final=0.01, views="squash"),
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """One setting of the sweep."""

    features: str
    norm: Norm
    lr: float
    weight_decay: float


# ---------------------------------------------------------------- streams of features


class Feed(Protocol):
    """Labelled features in the order of training."""

    def __len__(self) -> int: ...

    def width(self, name: str) -> int:
        """D of a feature set."""
        ...

    def batches(self, epoch: int, size: int) -> Iterator[tuple[Batch, Tensor]]:
        """Whole batches of an epoch, each image at most once, and their labels."""
        ...


def feature_set(features: Tensor, name: str) -> Tensor:
    """[n, layers, D] to the paper's average-pooled last layer [n, D], or the layers concatenated [n, layers * D]."""
    return features[:, -1] if name == "last" else features.flatten(1)


class Cached:
    """Features that are on disk, of some rows. Small enough ones are laid out in memory, standardised."""

    def __init__(self, features: Features, rows: np.ndarray, labels: Tensor, names: Sequence[str], seed: int,
                 standards: dict[str, Standard] | None = None) -> None:  # fmt: skip
        self.features, self.rows, self.labels, self.names, self.seed = features, rows, labels, names, seed
        self.standards = standards or {}
        whole = len(rows) * sum(self.width(name) for name in names) * 4
        self.whole = self.read(rows) if whole <= IN_MEMORY else None

    def __len__(self) -> int:
        return len(self.rows)

    def width(self, name: str) -> int:
        if name in self.standards:
            return self.standards[name].width
        _, layers, d = self.features.values.shape
        return int(d if name == "last" else layers * d)

    def read(self, rows: np.ndarray) -> Batch:
        found = self.features.rows(rows)
        sets = {name: feature_set(found, name) for name in self.names}
        return {name: self.standards[name](x) if name in self.standards else x for name, x in sets.items()}

    def batches(self, epoch: int, size: int) -> Iterator[tuple[Batch, Tensor]]:
        order = permutation(self.seed, "probe order", epoch, len(self))
        for index in np.split(order[: len(self) // size * size], len(self) // size):
            yield self.at(index), self.labels[index]

    def all(self, size: int = 4096) -> Iterator[tuple[Batch, Tensor]]:
        """Everything once, in order."""
        for start in range(0, len(self), size):
            index = np.arange(start, min(start + size, len(self)))
            yield self.at(index), self.labels[index]

    def at(self, index: np.ndarray) -> Batch:
        if self.whole is None:
            return self.read(self.rows[index])
        return {name: x[index] for name, x in self.whole.items()}


class Standard:
    """By mean and deviation of known features: the probe's batch norm, without its noise.

    With more dimensions than samples, features are then rotated into the span of the known ones. Gradient descent from zero
    never leaves that span and does not notice a rotation, so the probe is the same and costs less.
    """

    def __init__(self, features: Features, rows: np.ndarray, name: str, chunk: int = 8192) -> None:
        count, total, squares = len(rows), torch.zeros(1), torch.zeros(1)
        for start in range(0, count, chunk):
            x = feature_set(features.rows(rows[start : start + chunk]), name).double()
            total, squares = total + x.sum(0), squares + x.square().sum(0)
        mean = total / count
        self.mean = mean.float()
        self.std = (squares / count - mean.square()).clamp(min=1e-12).sqrt().float()
        self.width = len(mean)
        self.basis: Tensor | None = None
        if self.width > count:
            known = feature_set(features.rows(rows), name)
            self.basis, _ = torch.linalg.qr(((known - self.mean) / self.std).T)
            self.width = count

    def __call__(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        return x if self.basis is None else x @ self.basis


# ---------------------------------------------------------------- heads


class Group:
    """Heads that look at the same features through the same normalisation, as one wide matrix."""

    def __init__(self, heads: Sequence[Head], width: int, classes: int, config: LinearConfig, device: torch.device,
                 seed: int) -> None:  # fmt: skip
        self.heads, self.name, self.norm, self.config = list(heads), heads[0].features, heads[0].norm, config
        h = len(heads)
        generator = torch.Generator().manual_seed(key(seed, f"probe weights {self.name} {self.norm}") >> 1)
        one = config.initial_std * torch.randn(width, 1, classes, generator=generator)  # all heads begin alike
        self.parameters = {
            "weight": one.expand(width, h, classes).contiguous().to(device),
            "bias": torch.zeros(1, h, classes, device=device),
        }
        if self.norm == "batch":
            self.parameters |= {
                "gain": torch.ones(width, h, 1, device=device),
                "shift": torch.zeros(width, h, 1, device=device),
            }
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.mean, self.var = (
            torch.zeros(width, device=device),
            torch.ones(width, device=device),
        )  # batch norm's running
        self.lr = torch.tensor([head.lr for head in heads], device=device)[:, None]  # [h, 1]
        self.decay = torch.tensor([head.weight_decay for head in heads], device=device)[:, None]

    def effective(self) -> tuple[Tensor, Tensor]:
        """The affine part of batch norm folded into weights [D, h, C] and biases [1, h, C]."""
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        if self.norm != "batch":
            return weight, bias
        return weight * self.parameters["gain"], bias + (weight * self.parameters["shift"]).sum(0, keepdim=True)

    def normalise(self, x: Tensor, training: bool) -> Tensor:
        if self.norm not in ("batch", "batch_plain"):
            return x
        if training:
            mean, var = x.mean(0), x.var(0, correction=0)
            unbiased = var * len(x) / max(1, len(x) - 1)
            self.mean.lerp_(mean, BN_MOMENTUM)
            self.var.lerp_(unbiased, BN_MOMENTUM)
        else:
            mean, var = self.mean, self.var
        return (x - mean) * (var + (1e-5 if self.norm == "batch" else 1e-6)).rsqrt()

    def gradients(self, x: Tensor, labels: Tensor, half: bool) -> dict[str, Tensor]:
        """Of the mean cross-entropy over the batch, for every head at once. x: [B, D], normalised."""
        weight, bias = self.effective()
        d, h, c = weight.shape
        flat = weight.view(d, h * c)
        flat = flat.bfloat16() if half else flat
        to_weight: Tensor | None = None
        to_bias = torch.zeros_like(bias)
        for xb, yb in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
            xb = xb.bfloat16() if half else xb
            error = ((xb @ flat).float().view(-1, h, c) + bias).softmax(-1)
            error.scatter_add_(
                2, yb[:, None, None].expand(-1, h, 1), error.new_full((1, 1, 1), -1.0).expand(len(yb), h, 1)
            )
            error = torch.nn.functional.hardshrink(error / len(x), 1e-30)  # denormal numbers are slow on CPUs
            to_bias += error.sum(0, keepdim=True)
            part = (xb.T @ (error.to(xb.dtype)).view(-1, h * c)).float()
            to_weight = part if to_weight is None else to_weight.add_(part)
        assert to_weight is not None
        to_weight = to_weight.view(d, h, c)
        if self.norm != "batch":
            return {"weight": to_weight, "bias": to_bias}
        gain, shift, own = (self.parameters[name] for name in ("gain", "shift", "weight"))
        return {
            "weight": to_weight * gain + shift * to_bias,
            "bias": to_bias,
            "gain": (to_weight * own).sum(2, keepdim=True),
            "shift": (own * to_bias).sum(2, keepdim=True),
        }

    def step(self, x: Tensor, labels: Tensor, factor: float, half: bool) -> None:
        """One step of SGD or LARS with momentum. factor: of every head's own rate."""
        lars = self.config.optimizer == "lars"
        for name, gradient in self.gradients(self.normalise(x, training=True), labels, half).items():
            p, v = self.parameters[name], self.velocity[name]
            if name == "weight" or (name == "bias" and self.config.decay_bias and not lars):
                if name == "weight" and lars:
                    size, slope = (t.square().sum((0, 2)).sqrt()[:, None] for t in (p, gradient))
                    trust = TRUST * size / (slope + self.decay * size)
                    trust = torch.where((size > 0) & (slope > 0), trust, torch.ones_like(trust))
                    gradient = torch.addcmul(gradient, self.decay, p).mul_(trust)
                else:
                    gradient = torch.addcmul(gradient, self.decay, p)
            torch.add(gradient, v, alpha=MOMENTUM, out=v)
            update = torch.add(gradient, v, alpha=MOMENTUM) if self.config.nesterov else v
            p.addcmul_(update, self.lr, value=-factor)  # in place and few: memory is what this costs

    def logits(self, x: Tensor) -> Tensor:
        """[B, D] to [B, h, C]."""
        weight, bias = self.effective()
        return (self.normalise(x, training=False) @ weight.flatten(1)).view(len(x), *bias.shape[1:]) + bias


def fit(feed: Feed, heads: Sequence[Head], config: LinearConfig, classes: int, device: torch.device, seed: int,
        half: bool = False) -> list[Group]:  # fmt: skip
    """Train all heads in one pass over a feed. half: matrix products in bf16."""
    several = max(1, COLUMNS // classes)
    groups: list[Group] = []
    for name, norm in dict.fromkeys((head.features, head.norm) for head in heads):
        alike = [head for head in heads if (head.features, head.norm) == (name, norm)]
        groups += [
            Group(alike[i : i + several], feed.width(name), classes, config, device, seed)
            for i in range(0, len(alike), several)
        ]
    size = min(config.batch_size, len(feed))
    per_epoch = len(feed) // size
    epochs = max(config.epochs, math.ceil(config.min_steps / per_epoch))
    step = 0
    for epoch in range(epochs):
        for batch, labels in feed.batches(epoch, size):
            factor = rate(step, epochs * per_epoch, per_epoch, config) * size / 256
            moved = {name: x.to(device) for name, x in batch.items()}
            for group in groups:
                group.step(moved[group.name], labels.to(device), factor, half)
            step += 1
    return groups


def rate(step: int, steps: int, per_epoch: int, config: LinearConfig) -> float:
    """The learning rate of a step as a share of its peak: warm-up, then a cosine or tenfold falls."""
    warmup = config.warmup_epochs * per_epoch
    if step < warmup:
        return step / warmup
    if config.milestones:
        return float(0.1 ** sum(step >= m * per_epoch for m in config.milestones))
    t = (step - warmup) / max(1, steps - warmup)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * t))


# ---------------------------------------------------------------- the probe


@dataclass(frozen=True)
class LinearResult:
    """predictions: of the chosen head on the test set, int64 [m]; sweep: every head's accuracy on the validation part."""

    predictions: Tensor
    chosen: Head
    sweep: list[tuple[Head, float]]


class Probe:
    """The probe of one recipe on one subject's features. views: the feed of augmented images, from rows and labels."""

    def __init__(self, config: LinearConfig, train: Features, labels: Tensor, classes: int, device: torch.device,
                 half: bool = False, seed: int = 0, views: ViewsOf | None = None) -> None:  # fmt: skip
        if len(train) < 2:
            raise UserError("the linear probe needs two labelled training images or more")
        self.config, self.train, self.labels, self.classes = config, train, labels, classes
        self.device, self.half, self.seed, self.views = device, half, seed, views

    def run(self, test: Features) -> LinearResult:
        """Choose a head without the test set, then predict the test set with it."""
        heads = [h for h in self.config.heads if h.features == "last" or self.train.values.shape[1] > 1]
        if not heads:
            raise UserError("linear.features 'concat4' needs several layers, and there is one: use 'last'")
        chosen, sweep, refit = heads[0], [], True
        if len(heads) > 1:
            fitting, validation = split(len(self.train), self.config.validation, self.seed)
            groups, standards = self.fitted(fitting, heads)
            held = self.cached(self.train, validation, self.labels[validation], heads, standards)
            sweep = validated(groups, held)
            chosen, refit = max(sweep, key=lambda entry: entry[1])[0], self.config.refit
        if refit:
            groups, standards = self.fitted(np.arange(len(self.train)), [chosen])
        unseen = self.cached(test, np.arange(len(test)), torch.zeros(len(test), dtype=torch.int64), [chosen], standards)
        group = next(g for g in groups if chosen in g.heads)
        parts = [
            group.logits(batch[group.name].to(self.device))[:, group.heads.index(chosen)].argmax(-1).cpu()
            for batch, _ in unseen.all()
        ]
        return LinearResult(torch.cat(parts), chosen, sweep)

    def fitted(self, rows: np.ndarray, heads: Sequence[Head]) -> tuple[list[Group], dict[str, Standard]]:
        """Heads trained on some rows, and the standardisation that they are used to."""
        labels, standards = self.labels[rows], {}
        if any(head.norm == "standard" for head in heads):
            standards = {name: Standard(self.train, rows, name) for name in names_of(heads)}
        if self.views:
            feed: Feed = self.views(rows, labels)
        else:
            feed = self.cached(self.train, rows, labels, heads, standards)
        return fit(feed, heads, self.config, self.classes, self.device, self.seed, self.half), standards

    def cached(self, features: Features, rows: np.ndarray, labels: Tensor, heads: Sequence[Head],
               standards: dict[str, Standard]) -> Cached:  # fmt: skip
        return Cached(features, rows, labels, names_of(heads), self.seed, standards)


class ViewsOf(Protocol):
    """The feed of augmented views of some rows of the training set."""

    def __call__(self, rows: np.ndarray, labels: Tensor) -> Feed: ...


def names_of(heads: Sequence[Head]) -> list[str]:
    return list(dict.fromkeys(head.features for head in heads))


def split(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and rows that choose: at least one of each."""
    order = permutation(seed, "probe validation", 0, n)
    held = min(n - 1, max(1, round(share * n)))
    return order[held:], order[:held]


def validated(groups: Sequence[Group], held: Cached) -> list[tuple[Head, float]]:
    """Every head with its accuracy."""
    correct = [torch.zeros(len(group.heads)) for group in groups]
    for batch, labels in held.all():
        for i, group in enumerate(groups):
            predictions = group.logits(batch[group.name].to(group.lr.device)).argmax(-1).cpu()  # [B, h]
            correct[i] += (predictions == labels[:, None]).sum(0)
    return [
        (head, float(right) / len(held))
        for group, rights in zip(groups, correct, strict=True)
        for head, right in zip(group.heads, rights, strict=True)
    ]
