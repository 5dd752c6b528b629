"""What is watched while training: the loss says nothing about collapse, so the features are looked at themselves."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openjepa.data.stream import Bad, Batch, DataConfig
from openjepa.engine import parallel
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.device import Later
from openjepa.engine.launch import Roll
from openjepa.engine.optim import Schedule
from openjepa.engine.run import Run, memory_gib
from openjepa.errors import Diverged, UserError
from openjepa.methods.method import Method

TOKENS = 2048  # patch features that the rank is estimated from


@dataclass(frozen=True, kw_only=True)
class MonitorsConfig:
    """How often the run looks at itself. Changes no result."""

    log_every: int = 50  # steps
    knn_every: float = 1  # epochs, when there are labels; 0 never
    knn_images: int = 5000  # labelled images that it uses, each fifth as queries among the others
    max_bad_steps: int = 10  # in a row, not finite and skipped, at which the run stops

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1:
            raise UserError(f"monitors.max_bad_steps is {self.max_bad_steps}: it must be at least 1")
        if self.log_every < 1 or self.knn_every < 0 or self.knn_images < 10:
            raise UserError("monitors: log_every must be at least 1, knn_every at least 0, knn_images at least 10")


@torch.no_grad()
def feature_statistics(features: Tensor) -> dict[str, float]:
    """How alive features are. features: [B, N, D], before layer norm.

    feature_std: standard deviation over the images, at the same patch and dimension, of layer-normed features: 0 when
        all images look the same.
    feature_rank: RankMe (Garrido et al., 2023), the exponential of the entropy of the singular values, of patch
        features less the mean of their place.
    feature_cosine: mean cosine between the pooled features of different images.
    """
    features = torch.nn.functional.layer_norm(features.float(), features.shape[-1:])
    pooled = torch.nn.functional.normalize(features.mean(1), dim=-1)  # B D
    b = len(pooled)
    cosine = (pooled.sum(0).square().sum() - b) / max(1, b * (b - 1))
    centred = (features - features.mean(0)).flatten(0, 1)
    centred = centred[:: -(-len(centred) // TOKENS)]  # of all images
    return {
        "feature_std": features.std(0, correction=0).mean().item(),
        "feature_rank": effective_rank(centred).item(),
        "feature_cosine": cosine.item(),
    }


def effective_rank(x: Tensor) -> Tensor:
    """RankMe of a matrix [n, D]: exp of the entropy of its normalised singular values; between 1 and min(n, D)."""
    values = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-12) + 1e-12
    return torch.exp(-(p * p.log()).sum())


@torch.no_grad()
def weight_distance(fast: nn.Module, slow: nn.Module) -> float:
    """Relative distance between context and target encoder: |fast - slow| / |slow|."""
    a: list[Tensor] = [*fast.parameters()]
    b: list[Tensor] = [*slow.parameters()]
    difference, size = (nn.utils.get_total_norm(x, foreach=True) for x in (torch._foreach_sub(a, b), b))
    return float(parallel.whole(difference) / parallel.whole(size))


def collapse_warning(statistics: dict[str, float], images: int, width: int) -> str | None:
    """A plain sentence when the target features say less and less about the image; fewer than eight tell nothing.

    The rank's limit lies between runs measured on the scenes (width 192): those that learned had 12 to 30, one with three
    times the learning rate had 5 and ended below random weights, its spread still 0.6.
    """
    if images < 8:
        return None
    if statistics["feature_std"] > 0.1 and statistics["feature_rank"] > 0.05 * width:
        return None
    return (
        f"the target features are collapsing (std over images {statistics['feature_std']:.3f}, effective rank "
        f"{statistics['feature_rank']:.0f} of {width}): raise the first value of schedule.ema towards 0.999, lower optim.lr, "
        "or lengthen schedule.warmup_epochs; a falling loss does not contradict this"
    )


@dataclass(frozen=True)
class Outcome:
    """What is known of a step before its numbers are: they may still be on the device."""

    step: int
    batch: Batch
    vitals: Later  # mean loss of all ranks, gradient norm, and their two wishes to stop
    losses: Tensor  # each image's own, [B]


class Watch:
    """Times the steps, looks whether they were finite, and, every so many, measures, writes and warns.

    It never touches what is trained. On a GPU it looks at a step when the next one is under way, so that nobody waits.
    """

    def __init__(
        self,
        run: Run,
        config: MonitorsConfig,
        schedule: Schedule,
        method: Method,
        data: DataConfig,
        images: int,
        device: torch.device,
        features: Callable[[Batch], Tensor] | None,
        knn: Callable[[], dict[str, float]] | None,
        name: Callable[[int], str] = str,
        dump: Callable[[int, Batch], str] | None = None,
        roll: Roll | None = None,
    ) -> None:
        """features: of a batch on the device, the product's, [B, N, D]; None of a method that makes none. name: of the image with
        an index. dump: keeps a step (how many were done before it, its batch), and says where.
        """
        self.run, self.config, self.schedule, self.method = run, config, schedule, method
        self.data, self.images, self.device, self.features, self.knn = data, images, device, features, knn
        self.name, self.dump, self.roll = name, dump, roll
        self.knn_every = max(1, round(config.knn_every * schedule.steps_per_epoch)) if config.knn_every else 0
        self._began = self._since = time.perf_counter()
        self._waited, self._steps, self._warned = 0.0, 0, False
        self._bad_images: list[Bad] = []
        self._unread: deque[Outcome] = deque()
        self.bad_in_a_row = 0

    def next(self, step: int, batches: Iterator[Batch]) -> Batch:
        """The batch of a step, counting the time it took to come."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        if self.roll:
            self.roll.begin(step)
        return batch

    def after_step(self, outcome: Outcome) -> None:
        """outcome.step: how many are done."""
        step = outcome.step
        self._steps += 1
        self._bad_images += outcome.batch.bad
        self._unread.append(outcome)
        last = step == self.schedule.steps
        if step % self.config.log_every == 0 or last:
            self.settle()
            self.note_bad_images()
            self.write(step, outcome.batch, outcome.vitals)
        self.settle(but=int(self.device.type == "cuda"))
        if self.knn and self.knn_every and (step % self.knn_every == 0 or last):
            start = time.perf_counter()
            scores = self.knn()
            self.run.log(step, scores, f"step {step:>{len(str(self.schedule.steps))}}  " + describe(scores))
            self._since += time.perf_counter() - start

    def settle(self, but: int = 0) -> None:
        """Read what steps came to, all but the newest so many. The same on every rank, whatever it meets.

        Raises UserError, with the last of them kept, after too many in a row that were not finite.
        """
        while len(self._unread) > but:
            outcome = self._unread.popleft()
            loss, norm, *wishes = outcome.vitals.read()
            self.run.heed((wishes[0], wishes[1]))
            if math.isfinite(loss) and math.isfinite(norm):
                self.bad_in_a_row = 0
                continue
            self.bad_in_a_row += 1
            guilty = outcome.batch.indices[~torch.isfinite(outcome.losses).cpu().numpy()].tolist()
            named = [name for names in parallel.gather([self.name(i) for i in guilty]) for name in names]
            if not named:  # the gradient alone
                named = [
                    n
                    for names in parallel.gather([self.name(i) for i in outcome.batch.indices.tolist()])
                    for n in names
                ]
            self.run.note_bad_step(outcome.step, loss, norm, named)
            if self.bad_in_a_row >= self.config.max_bad_steps and not self._unread:
                self.give_up(outcome, loss)

    def give_up(self, outcome: Outcome, loss: float) -> None:
        kept = self.dump(outcome.step - 1, outcome.batch) if self.dump else None
        self.run.saver.wait()
        saved = checkpoints(self.run.path)
        raise Diverged(
            f"{self.bad_in_a_row} steps in a row were not finite, the last is step {outcome.step} (loss {loss:g}); "
            + (
                f"the newest checkpoint is of step {saved[-1].step}, before them"
                if saved
                else "there is no checkpoint yet"
            )
            + "; begin again in another --out with a lower optim.lr, optim.clip_norm 1, or precision fp32"
            + (f"; to see where it comes from: openjepa replay {kept}" if kept else "")
        )

    def note_bad_images(self) -> None:
        """Of all ranks. Raises UserError, on all of them, when they are too many."""
        mine, self._bad_images = self._bad_images, []
        self.run.note_bad([b for bad in parallel.gather(mine) for b in bad], self.data.max_bad, self.images)

    def write(self, step: int, batch: Batch, vitals: Later) -> None:
        """Loss and norm are of all ranks; what is said of features, of this one's images. Nothing of a step that was skipped."""
        now = time.perf_counter()
        loss, norm, *_ = vitals.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return
        seconds = max(1e-9, now - self._since)
        statistics, said, warning = self.look(batch) if self.features else ({}, "", None)
        values = {
            "loss": loss,
            **statistics,
            **batch.masks.counts(),
            "lr": self.schedule.lr(step - 1),
            "weight_decay": self.schedule.weight_decay(step - 1),
            "ema_momentum": self.schedule.momentum(step - 1),
            "gradient_norm": norm,
            "skipped_steps": self.run.skipped,
            "images_per_s": self._steps * self.data.batch_size / seconds,
            "data_wait_share": min(1.0, self._waited / seconds),
            "memory_gib": memory_gib(self.device),
            "epoch": step / self.schedule.steps_per_epoch,
            "elapsed_s": now - self._began,
        }
        left = (self.schedule.steps - step) * seconds / self._steps
        line = (
            f"step {step:>{len(str(self.schedule.steps))}}/{self.schedule.steps}  loss {values['loss']:.4f}  {said}"
            f"{values['images_per_s']:.0f} images/s  {clock(left)} left"
        )
        self.run.log(step, values, line)
        if warning and not self._warned and step > self.schedule.warmup:
            self.run.warn(warning)
        self._warned = self._warned or bool(warning and step > self.schedule.warmup)
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def look(self, batch: Batch) -> tuple[dict[str, float], str, str | None]:
        """At the features of a batch: numbers, what a line says of them, and a warning where they collapse."""
        assert self.features
        features = self.features(batch.to(self.device))
        alive = bool(features.isfinite().all())  # the step was; the weights that it left may be too large
        statistics = feature_statistics(features) if alive else {}
        said = (
            f"std {statistics['feature_std']:.2f}  rank {statistics['feature_rank']:.0f}  "
            if alive
            else "features not finite  "
        )
        if not self.method.follows:  # nothing else can collapse
            return statistics, said, None
        warning = collapse_warning(statistics, len(features), features.shape[-1]) if alive else None
        return (
            statistics | {"encoder_distance": weight_distance(self.method.encoder, self.method.product)},
            said,
            warning,
        )


def describe(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def clock(seconds: float) -> str:
    """1:05:09 or 5:09."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
