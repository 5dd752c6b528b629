"""Fine-tuning: the whole encoder and a linear head learn from labels (paper, table 15 and appendix A; MAE, appendix A.2).

Augmentations, mixing and erasing are timm's, the implementation that the published numbers were made with; its random
numbers are seeded for each image and each step.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from openjepa.data.sources import Source
from openjepa.data.workers import loaded
from openjepa.errors import UserError
from openjepa.evaluate.features import BATCH, Images, View
from openjepa.evaluate.views import Answered, Augmented
from openjepa.models.encoder import Encoder
from openjepa.models.vit import ViT
from openjepa.rng import key, permutation

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """AdamW with layer-wise decay of the rate, a cosine after a linear warm-up.

    lr: of the head, for the batch as it is, or for 256 images where per_256. randaug: timm's words for it, or empty.
    ema: the decay of averaged weights that are then scored, or 0.
    """

    epochs: int = 50
    batch_size: int = 512
    lr: float = 3e-5
    per_256: bool = False
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    betas: tuple[float, float] = (0.9, 0.999)
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    randaug: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.0
    ema: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0 or not 0 < self.layer_decay <= 1:
            raise UserError("finetune: epochs, batch_size and lr are above 0, layer_decay is above 0 and at most 1")
        if (
            not 0 <= self.drop_path < 1
            or not 0 <= self.smoothing < 1
            or not 0 <= self.ema < 1
            or not 0 <= self.erase <= 1
        ):
            raise UserError("finetune: drop_path, smoothing, erase and ema are shares from 0 to below 1")
        if self.randaug and not self.randaug.startswith("rand-"):
            raise UserError(
                f"finetune.randaug '{self.randaug}': timm's words, such as rand-m9-mstd0.5-inc1, or nothing"
            )
        if min(self.mixup, self.cutmix, self.weight_decay, self.warmup_epochs, self.min_lr) < 0:
            raise UserError("finetune: mixup, cutmix, weight_decay, warmup_epochs and min_lr must not be negative")


# Protocols, D.5, D.6 and B. The paper does not say the warm-up of the first two.
RECIPES: dict[str, FinetuneConfig] = {
    "low_shot": FinetuneConfig(),  # L/16's; H/14 and H/16 at 448 with --finetune.weight_decay 0.4
    "full": FinetuneConfig(batch_size=528, lr=1e-4, weight_decay=0.04, drop_path=0.25, mixup=0.8, cutmix=1.0),
    "mae": FinetuneConfig(epochs=100, batch_size=1024, lr=5e-4, per_256=True, layer_decay=0.65, drop_path=0.1, mixup=0.8,
                          cutmix=1.0, erase=0.25),  # B/16's; L and H: 50 epochs, 1e-3, .75, drop path .2 and .3
}  # fmt: skip


class Classifier(nn.Module):
    """Patches after the final norm, averaged, and a linear layer. Images as the encoder wants them, normalised."""

    def __init__(self, vit: ViT, classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.config.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.vit(images).mean(1))
        return scores


def layer_groups(model: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameter groups whose `lr_scale` is decay^(blocks + 1 - layer): patches are layer 0, norm and head the last.

    Biases and vectors are not decayed.
    """
    last = len(model.vit.blocks) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = last
        if name.startswith("vit.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("vit.patch_embed", "vit.prefix_tokens")):
            layer = 0
        decays = parameter.ndim > 1
        group = groups.setdefault((layer, decays), {
            "params": [], "lr_scale": config.layer_decay ** (last - layer),
            "weight_decay": config.weight_decay if decays else 0.0})  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())


def finetune(config: FinetuneConfig, encoder: Encoder, source: Source, rows: np.ndarray, labels: Tensor, classes: int,
             view: View, autocast: Autocast, seed: int, workers: int = 0,
             say: Callable[[str], None] = lambda line: None) -> Classifier:  # fmt: skip
    """Fine-tune a copy of an encoder on some rows of a source. labels: int64 [len(source)]. Returns it in evaluation mode.

    say: gets a line an epoch. Raises UserError when the loss is not finite.
    """
    device = encoder.vit.patch_embed.proj.weight.device
    vit = ViT(replace(encoder.vit.config, drop_path=config.drop_path))
    vit.load_state_dict(encoder.vit.state_dict())
    vit.register_buffer("positions", encoder.vit.get_buffer("positions").clone(), persistent=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "fine-tuning head") >> 1)
        model = Classifier(vit, classes).to(device)
    mixing = config.mixup > 0 or config.cutmix > 0
    size = min(config.batch_size, len(rows))
    size -= size % 2 if mixing and size > 1 else 0  # timm mixes pairs
    per_epoch = len(rows) // size
    steps, warmup = config.epochs * per_epoch, min(config.warmup_epochs, config.epochs / 4) * per_epoch
    peak = config.lr * (size / 256 if config.per_256 else 1)
    optimizer = torch.optim.AdamW(layer_groups(model, config), lr=peak, betas=config.betas)
    average = ModelEmaV3(model, decay=config.ema) if config.ema else None
    mixer = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)
    hard = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    soft = SoftTargetCrossEntropy()
    step = 0
    model.train()
    for epoch in range(config.epochs):
        order = permutation(seed, "fine-tuning order", epoch, len(rows))
        images = Distorted(source, rows[order], view, config, encoder, seed, epoch)
        for batch, target in loaded(Answered(images, labels), workers, batch_size=size, drop_last=True):
            with seeded(key(seed, f"fine-tuning step {step}")):
                batch, target = batch.to(device), target.to(device)
                mixed = mixing and size > 1
                if mixed:
                    batch, target = mixer(batch, target)
                for group in optimizer.param_groups:
                    group["lr"] = group["lr_scale"] * rate(step, steps, warmup, peak, config.min_lr)
                with autocast():
                    scores = model(batch)
                loss = (soft if mixed else hard)(scores.float(), target)
                optimizer.zero_grad()
                loss.backward()
                if config.clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                if average:
                    average.update(model, step=step)
            step += 1
        if not torch.isfinite(loss):
            raise UserError(
                f"fine-tuning diverged in epoch {epoch + 1} (loss {loss.item():g}): lower its lr, or set its clip_norm to 1"
            )
        say(f"epoch {epoch + 1}/{config.epochs}  loss {loss.item():.4g}")
    found: Classifier = copy.deepcopy(average.module) if average else model
    return found.eval()


def rate(step: int, steps: int, warmup: float, peak: float, low: float) -> float:
    """Linear from 0, then a half cosine to the least."""
    if step < warmup:
        return peak * step / warmup
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def classify(model: Classifier, encoder: Encoder, images: Images,
             autocast: Autocast, workers: int = 0) -> Tensor:  # fmt: skip
    """The class of every image, int64 [n]. encoder: whose normalisation the images get."""
    device = model.head.weight.device
    parts = []
    for batch in loaded(images, workers, batch_size=BATCH):
        with autocast():
            parts.append(model(encoder.normalise(batch.to(device))).argmax(-1).cpu())
    return torch.cat(parts)


class Distorted(Dataset[Tensor]):
    """Random resized crops, flipped, with RandAugment and erasing, normalised. Items: float32 [C, H, W]."""

    def __init__(self, source: Source, indices: np.ndarray, view: View, config: FinetuneConfig, encoder: Encoder, seed: int,
                 epoch: int) -> None:  # fmt: skip
        self.views = Augmented(source, indices, view, "squash" if view.squash else "crop", seed, epoch)
        self.indices, self.seed, self.epoch = indices, seed, epoch
        mean, std = encoder.statistics()
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
        self.randaug = None
        if config.randaug and view.channels == 3:
            self.randaug = rand_augment_transform(config.randaug, {"img_mean": tuple(round(255 * m) for m in mean)})
        self.erase = RandomErasing(config.erase, mode="pixel", device="cpu") if config.erase else None

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, i: int) -> Tensor:
        image = self.views[i]
        with seeded(key(self.seed, f"fine-tuning image {self.epoch} {int(self.indices[i])}")):
            if self.randaug:
                picture = self.randaug(Image.fromarray(image.permute(1, 2, 0).numpy()))
                image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            normalised = (image.float() / 255 - self.mean) / self.std
            return self.erase(normalised) if self.erase else normalised


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators, which timm draws from, at a seed; as they were afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed >> 1)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
