"""I-JEPA recipes: those that a CPU can run, and the paper's and the release's for GPUs (its appendix A).

The first line of each is what `openjepa recipes` shows; the rest says what it costs and what it reached.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from openjepa.data.augment import AugmentConfig
from openjepa.data.stream import DataConfig
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.masking import MaskingConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.recipe import Recipe


def ijepa_scenes() -> Recipe:
    """What `openjepa demo` runs: 64-pixel scenes, minutes of training on 2 cores; the paper's loss alone.

    Three departures from the paper's values carry it: images are normalised by the scenes' own statistics (their contrast is
    half of ImageNet's), crops zoom in further, as objects are a patch or two wide, and the target encoder never stops
    following, as in so few steps it would be left behind. Measured: README, "Results".
    """
    return Recipe(
        model=ViTConfig(size="Ti", image_size=(64, 64), patch_size=8, depth=4),
        predictor=PredictorConfig(width=96, depth=2),
        data=DataConfig(batch_size=32, mean=(0.625, 0.625, 0.627), std=(0.134, 0.133, 0.140)),
        augment=AugmentConfig(crop_scale=(0.1, 0.7)),
        optim=OptimConfig(lr=5e-4, start_lr=1e-4, final_weight_decay=0.04),
        schedule=ScheduleConfig(epochs=6.5, warmup_epochs=0.5, ema=(0.996, 0.998)),
        monitors=MonitorsConfig(log_every=100, knn_every=0),
    )


# A short run of MAE, whose encoder is the best beginning that was found on small sets: docs/small-data.md.
PAINTING: dict[str, Any] = {
    "method": "mae",
    "model": {"class_token": False},
    "mae": {"decoder_width": 96, "decoder_depth": 3, "decoder_heads": 3},
    "augment": {"crop_scale": [0.2, 1.0], "flip": 0.5},
    "optim": {"lr": 1e-3, "start_lr": 0.0, "final_lr": 0.0, "weight_decay": 0.05, "final_weight_decay": 0.05},
    "schedule": {"epochs": 2, "warmup_epochs": 0.12},
}
HIDDEN = MaskingConfig(strategy="random", hidden=0.75)  # after painting, on a grid of 8x8, sooner than blocks


def ijepa_cifar10_cpu() -> Recipe:
    """32-pixel images such as CIFAR-10's, about half an hour on 2 cores: two epochs of painting, then six of I-JEPA.

    openjepa pretrain --recipe ijepa_cifar10_cpu --data cifar10/train.parquet --out runs/cifar10
    Measured: README, "Results"; why so: docs/small-data.md.
    """
    return Recipe(
        first=PAINTING,
        model=ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6, init="xavier"),
        predictor=PredictorConfig(width=96, depth=3),
        masking=HIDDEN,
        data=DataConfig(batch_size=32),
        optim=OptimConfig(lr=8e-4, start_lr=5e-5, final_weight_decay=0.04, betas=(0.9, 0.95)),
        schedule=ScheduleConfig(epochs=6, warmup_epochs=0.4, ema=(0.996, 0.9993)),
        monitors=MonitorsConfig(log_every=250),
    )


def ijepa_cifar10_alone_cpu() -> Recipe:
    """The same images and networks with the paper's masks and loss alone, from chance: what `bench compare` compares."""
    return Recipe(
        model=ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6),
        predictor=PredictorConfig(width=96, depth=3),
        data=DataConfig(batch_size=32),
        optim=OptimConfig(lr=4e-4, start_lr=5e-5, final_weight_decay=0.04),
        schedule=ScheduleConfig(epochs=8, warmup_epochs=0.5, ema=(0.997, 0.9995)),
        monitors=MonitorsConfig(log_every=250),
    )


def painting(predictor: PredictorConfig, rate: float, epochs: float = 1.0) -> dict[str, Any]:
    """The run of MAE that comes first, with a decoder as large as the predictor; rises over 6 % of its epochs."""
    return {
        **PAINTING,
        "mae": {"decoder_width": predictor.width, "decoder_depth": predictor.depth, "decoder_heads": 3},
        "optim": {**PAINTING["optim"], "lr": rate},
        "schedule": {"epochs": epochs, "warmup_epochs": round(0.06 * epochs, 3)},
    }


CPU = ViTConfig(size="Ti", depth=6), PredictorConfig(width=96, depth=3)  # what a CPU trains long enough in minutes
GPU = ViTConfig(size="S"), PredictorConfig(width=192, depth=6)
IMAGENETTE = (0.467, 0.462, 0.429), (0.274, 0.271, 0.29)
TINY_IMAGENET = (0.484, 0.444, 0.396), (0.283, 0.274, 0.284)


def after_painting(networks: tuple[ViTConfig, PredictorConfig], image: int, patch: int, painted: float, epochs: float,
                   ema: tuple[float, float], colours: tuple[tuple[float, ...], tuple[float, ...]],
                   rate: float = 5e-4, batch: int = 32, masking: MaskingConfig = HIDDEN) -> Recipe:  # fmt: skip
    """What `ijepa_auto` chooses from, and the recipes of small sets: epochs of I-JEPA after some of painting.

    Its predictor begins with Xavier's weights: from smaller ones it holds back, for some thousand steps, what the
    encoder has learned. Why so: docs/small-data.md.
    """
    model, predictor = networks
    return Recipe(
        first=painting(predictor, rate, painted),
        model=replace(model, image_size=(image, image), patch_size=patch, init="xavier"),
        predictor=predictor,
        masking=masking,
        data=DataConfig(batch_size=batch, mean=colours[0], std=colours[1]),
        optim=OptimConfig(lr=rate, start_lr=rate / 10, final_weight_decay=0.04, betas=(0.9, 0.95)),
        schedule=ScheduleConfig(epochs=epochs, warmup_epochs=round(0.06 * epochs, 3), ema=ema),
        monitors=MonitorsConfig(log_every=250),
    )


def ijepa_imagenette_cpu() -> Recipe:
    """96-pixel photographs, Imagenette's 9,469, about 50 minutes of one core.

    openjepa pretrain --recipe ijepa_imagenette_cpu --data imagenette160/train.parquet --out runs/imagenette
    Measured, and beside MAE: docs/small-data.md, "What it gives".
    """
    return after_painting(CPU, 96, 12, 18, 54, (0.9977, 0.9996), IMAGENETTE)


def ijepa_tiny_imagenet_cpu() -> Recipe:
    """64-pixel photographs, Tiny-ImageNet's 100,000, about 40 minutes on 2 cores; run with a fifth of them, somewhat shorter."""
    return after_painting(CPU, 64, 8, 1.7, 5, (0.9977, 0.9996), TINY_IMAGENET)


def ijepa_cifar10() -> Recipe:
    """ViT-S/4 on 32-pixel images such as CIFAR-10's, 30 epochs of painting and 100 of I-JEPA, one GPU; not run yet."""
    colours = DataConfig().mean, DataConfig().std
    return after_painting(GPU, 32, 4, 30, 100, (0.9991, 0.9998), colours, rate=8e-4, batch=128)


def ijepa_tiny_imagenet() -> Recipe:
    """ViT-S/8 on Tiny-ImageNet's 100,000 images of 64 pixels, 15 epochs of painting and 50 of I-JEPA, one GPU; not run yet."""
    return after_painting(GPU, 64, 8, 15, 50, (0.9991, 0.9998), TINY_IMAGENET, batch=128)


def ijepa_imagenette() -> Recipe:
    """ViT-S/16 at 160 px on Imagenette's 9,469 images, 40 epochs of painting and 160 of I-JEPA, one GPU; not run yet."""
    return after_painting(GPU, 160, 16, 40, 160, (0.9984, 0.9997), IMAGENETTE, batch=64, masking=MaskingConfig())


def paper(size: str, predictor_depth: int, epochs: float, warmup: float, start_lr: float, image: int = 224,
          patch: int = 16) -> Recipe:  # fmt: skip
    """The values that all of the paper's rows share: batch 2048, lr 1e-3, weight decay 0.04 to 0.4, EMA 0.996 to 1."""
    return Recipe(
        model=ViTConfig(size=size, image_size=(image, image), patch_size=patch),
        predictor=PredictorConfig(width=384, depth=predictor_depth),
        data=DataConfig(batch_size=2048),
        optim=OptimConfig(start_lr=start_lr),
        schedule=ScheduleConfig(epochs=epochs, warmup_epochs=warmup),
    )


def ijepa_vitb16() -> Recipe:
    """ViT-B/16, ImageNet-1k, 600 epochs (paper: 72.9 % linear); not run here."""
    return paper("B", 6, 600, 15, 1e-4)


def ijepa_vitl16() -> Recipe:
    """ViT-L/16, ImageNet-1k, 600 epochs (paper: 77.5 % linear); not run here."""
    return paper("L", 12, 600, 15, 1e-4)


def ijepa_vith14() -> Recipe:
    """ViT-H/14, ImageNet-1k, 300 epochs (paper: 79.3 % linear); not run here."""
    return paper("H", 12, 300, 40, 2e-4, patch=14)


def ijepa_vith16_448() -> Recipe:
    """ViT-H/16 at 448 px, ImageNet-1k, 300 epochs (paper: 81.1 % linear); not run here."""
    return paper("H", 12, 300, 40, 2e-4, image=448)


def ijepa_vith14_in22k() -> Recipe:
    """ViT-H/14, ImageNet-22k, 66 epochs; not run here."""
    return paper("H", 12, 66, 3, 2e-4, patch=14)


def ijepa_vitg16_in22k() -> Recipe:
    """ViT-G/16, ImageNet-22k, 44 epochs; not run here."""
    return paper("G", 16, 44, 3, 2e-4)


RECIPES = {
    make.__name__: make
    for make in (
        ijepa_scenes,
        ijepa_cifar10_cpu,
        ijepa_cifar10_alone_cpu,
        ijepa_imagenette_cpu,
        ijepa_tiny_imagenet_cpu,
        ijepa_cifar10,
        ijepa_tiny_imagenet,
        ijepa_imagenette,
        ijepa_vitb16,
        ijepa_vitl16,
        ijepa_vith14,
        ijepa_vith16_448,
        ijepa_vith14_in22k,
        ijepa_vitg16_in22k,
    )
}
