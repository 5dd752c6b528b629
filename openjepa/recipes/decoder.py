"""Decoder recipes: RCDM for a run's representation; the run gives the model, the masks' sizes and the normalisation.

The first line of each is what `openjepa recipes` shows; the rest says what it costs and what it reached.
"""

from __future__ import annotations

from dataclasses import replace

from openjepa.data.augment import AugmentConfig
from openjepa.data.stream import DataConfig
from openjepa.decoder.rcdm import RCDMConfig
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.masking import MaskingConfig
from openjepa.recipes.recipe import Recipe

CENTRE = AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=0.5)  # the released RCDM's
ONE_BLOCK = MaskingConfig(targets=1, context_scale=(1.0, 1.0), min_keep=1)  # all that is outside is seen


def rates(lr: float) -> OptimConfig:
    """Constant, without weight decay."""
    return OptimConfig(lr=lr, start_lr=lr, final_lr=lr, weight_decay=0.0, final_weight_decay=0.0)


def decoder(config: RCDMConfig, batch: int, lr: float, schedule: ScheduleConfig) -> Recipe:
    """What all share: one block, the middle of an image, a constant rate."""
    return Recipe(
        method="rcdm",
        rcdm=config,
        masking=ONE_BLOCK,
        data=DataConfig(batch_size=batch),
        augment=CENTRE,
        optim=rates(lr),
        schedule=schedule,
    )


def adm(config: RCDMConfig, lr: float = 1e-4) -> Recipe:
    """The released values: batches of 256, a constant rate, the average of momentum 0.9999, 300,000 steps (I-JEPA, appendix E)."""
    return decoder(config, 256, lr, ScheduleConfig(epochs=60, warmup_epochs=0, ema=(0.9999, 0.9999)))


def small(config: RCDMConfig, epochs: float) -> Recipe:
    """For minutes instead of days: smaller batches at a higher rate, and an average that is of the last steps alone."""
    made = decoder(config, 32, 4e-4, ScheduleConfig(epochs=epochs, warmup_epochs=0, ema=(0.99, 0.9995)))
    return replace(made, monitors=MonitorsConfig(log_every=250))


NARROW = RCDMConfig(
    width=32, multipliers=(1, 2, 4), blocks=1, attention=(8,), head_width=32, predict="velocity"
)  # which soon heeds what it is told: docs/decoder.md


def rcdm_cifar10_cpu() -> Recipe:
    """Blocks of 32-pixel images such as CIFAR-10's, which are 12 to 16 pixels a side: half an hour on 2 cores."""
    return small(replace(NARROW, size=16), epochs=8)


def rcdm_32_cpu() -> Recipe:
    """Blocks of larger images at 32 pixels a side: half an hour on 2 cores for 50,000 images."""
    return small(replace(NARROW, size=32), epochs=2)


def rcdm_64() -> Recipe:
    """ADM's U-Net at 64 pixels (the released script's own values), 60 epochs of ImageNet, GPUs; not run here."""
    return adm(RCDMConfig(size=64, width=128, multipliers=(1, 2, 3, 4), attention=(16, 8), learn_variance=True))


def rcdm_128() -> Recipe:
    """ADM's U-Net at 128 pixels (the released RCDM's), 60 epochs of ImageNet, 32 GPUs; not run here."""
    return adm(RCDMConfig(size=128, width=256, multipliers=(1, 1, 2, 3, 4), attention=(32, 16, 8), learn_variance=True))


RECIPES = {make.__name__: make for make in (rcdm_cifar10_cpu, rcdm_32_cpu, rcdm_64, rcdm_128)}
