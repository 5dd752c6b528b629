"""iBOT recipes: the published ones (Zhou et al., 2022, appendix), and one that a CPU can run."""

from __future__ import annotations

from dataclasses import replace

from openjepa.data.augment import AugmentConfig, CropsConfig
from openjepa.data.decode import Resize
from openjepa.data.stream import DataConfig
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.methods.ibot import IBOTConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.methods import DISTORTED
from openjepa.recipes.recipe import Recipe


def rates(lr: float, final_lr: float = 1e-6, clip_each: float = 3.0) -> OptimConfig:
    """Warm-up from 0, a half cosine, weight decay 0.04 to 0.4, each parameter's gradient clipped."""
    return OptimConfig(lr=lr, start_lr=0.0, final_lr=final_lr, clip_each=clip_each)


def distorted(scale: tuple[float, float], blur: float = 1.0, resize: Resize = "bilinear") -> AugmentConfig:
    """The first large crop."""
    return replace(DISTORTED, crop_scale=scale, resize=resize, blur=blur)


def ibot_cifar10_cpu() -> Recipe:
    """32-pixel images such as CIFAR-10's, the encoder of ijepa_cifar10_cpu; run narrower, for half an hour of one core.

    openjepa pretrain --recipe ibot_cifar10_cpu --data cifar10/train.parquet --out runs/ibot
    200,000 images, at 21 a second and core: two and a half hours of one (docs/comparison.md). Crops of 16 pixels beside two of
    32, no blur (a crop has few pixels to lose), fewer prototypes for ten classes.
    """
    return Recipe(
        method="ibot",
        model=ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6, class_token=True),
        ibot=IBOTConfig(prototypes=1024, hidden=512, bottleneck=128),
        crops=CropsConfig(second_blur=0.0, small=2, small_scale=(0.1, 0.4), small_blur=0.0),
        data=DataConfig(batch_size=64),
        augment=distorted((0.4, 1.0), blur=0.0),
        optim=rates(5e-4),
        schedule=ScheduleConfig(epochs=4, warmup_epochs=0.5, ema=(0.99, 1.0), ema_shape="cosine"),
        monitors=MonitorsConfig(log_every=250),
    )


def ibot_imagenette() -> Recipe:
    """ViT-S/16 at 160 px on Imagenette, 200 epochs, one GPU; the encoder of ijepa_imagenette, to compare; not run yet.

    Crops of 64 pixels beside two of 160, fewer prototypes for ten classes.
    """
    return Recipe(
        method="ibot",
        model=ViTConfig(size="S", image_size=(160, 160), class_token=True),
        ibot=IBOTConfig(prototypes=2048, temperature_epochs=20),
        crops=CropsConfig(small=6, small_size=(64, 64)),
        data=DataConfig(batch_size=128),
        augment=distorted((0.25, 1.0)),
        optim=rates(5e-4),
        schedule=ScheduleConfig(epochs=200, warmup_epochs=10, ema_shape="cosine"),
    )


def ibot_vits16() -> Recipe:
    """ViT-S/16, ImageNet-1k, 800 epochs (published, with learned positions: 77.9 % linear, 75.2 % k-NN); not run here."""
    return Recipe(
        method="ibot",
        model=ViTConfig(size="S", class_token=True, drop_path=0.1),
        ibot=IBOTConfig(norm_last_layer=False),
        data=DataConfig(batch_size=1024),
        augment=distorted((0.25, 1.0), resize="bicubic"),
        optim=rates(5e-4 * 1024 / 256),
        schedule=ScheduleConfig(epochs=800, warmup_epochs=10, ema_shape="cosine"),
    )


def ibot_vitb16() -> Recipe:
    """ViT-B/16, ImageNet-1k, 400 epochs (published, with learned positions: 79.5 % linear, 77.1 % k-NN); not run here."""
    return Recipe(
        method="ibot",
        model=ViTConfig(size="B", class_token=True, drop_path=0.1),
        ibot=IBOTConfig(temperature_epochs=49, freeze_last_layer_epochs=3),
        crops=CropsConfig(small_scale=(0.05, 0.32)),
        data=DataConfig(batch_size=1024),
        augment=distorted((0.32, 1.0), resize="bicubic"),
        optim=rates(7.5e-4 * 1024 / 256, 2e-6, 0.3),
        schedule=ScheduleConfig(epochs=400, warmup_epochs=10, ema_shape="cosine"),
    )


RECIPES = {make.__name__: make for make in (ibot_cifar10_cpu, ibot_imagenette, ibot_vits16, ibot_vitb16)}
