"""MAE recipes: the paper's (He et al., 2021, appendix A.1), and one that a CPU can run."""

from __future__ import annotations

from dataclasses import replace

from openjepa.data.augment import AugmentConfig
from openjepa.data.stream import DataConfig
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.methods.mae import MASKING, MAEConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.ijepa import ijepa_imagenette_cpu
from openjepa.recipes.recipe import Recipe


def rates(lr: float) -> OptimConfig:
    """Warm-up from 0, a half cosine to 0, constant weight decay."""
    return OptimConfig(lr=lr, start_lr=0.0, final_lr=0.0, weight_decay=0.05, final_weight_decay=0.05, betas=(0.9, 0.95))


def recipe(
    model: ViTConfig, batch: int, lr: float, epochs: float, warmup: float, mae: MAEConfig | None = None
) -> Recipe:
    """What all share: a class token, a quarter of the patches visible, a crop and a flip."""
    return Recipe(
        method="mae",
        model=replace(model, class_token=True),
        mae=mae or MAEConfig(),
        masking=MASKING,
        data=DataConfig(batch_size=batch),
        augment=AugmentConfig(crop_scale=(0.2, 1.0), flip=0.5),
        optim=rates(lr),
        schedule=ScheduleConfig(epochs=epochs, warmup_epochs=warmup),
    )


def paper(size: str, patch: int = 16) -> Recipe:
    """The values that all of the paper's rows share: batch 4096, lr 1.5e-4 for each 256 images, 1600 epochs."""
    made = recipe(ViTConfig(size=size, patch_size=patch), 4096, 1.5e-4 * 4096 / 256, 1600, 40)
    return replace(made, augment=replace(made.augment, resize="bicubic"))


def mae_cifar10_cpu() -> Recipe:
    """32-pixel images such as CIFAR-10's, the encoder of ijepa_cifar10_cpu; run narrower, for half an hour of one core.

    openjepa pretrain --recipe mae_cifar10_cpu --data cifar10/train.parquet --out runs/mae
    800,000 crops, at 240 a second and core (docs/comparison.md, which has what it reached beside I-JEPA and iBOT).
    """
    model = ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6)
    decoder = MAEConfig(decoder_width=96, decoder_depth=3, decoder_heads=3)
    return replace(recipe(model, 64, 1e-3, 16, 1, decoder), monitors=MonitorsConfig(log_every=250))


def mae_imagenette_cpu() -> Recipe:
    """96-pixel photographs, the painting of ijepa_imagenette_cpu for about as long as all of it; run for half an hour of one core.

    Beside it, measured: docs/small-data.md, "What it gives".
    """
    painting = ijepa_imagenette_cpu().before()
    assert painting is not None
    return replace(painting, schedule=ScheduleConfig(epochs=90, warmup_epochs=5.4))


def mae_imagenette() -> Recipe:
    """ViT-S/16 at 160 px on Imagenette, 200 epochs, one GPU; the encoder of ijepa_imagenette, to compare; not run yet."""
    model = ViTConfig(size="S", image_size=(160, 160))
    return recipe(model, 256, 1e-3, 200, 10, MAEConfig(decoder_width=192, decoder_depth=4, decoder_heads=6))


def mae_vitb16() -> Recipe:
    """ViT-B/16, ImageNet-1k, 1600 epochs (published: 67.8 % linear); not run here."""
    return paper("B")


def mae_vitl16() -> Recipe:
    """ViT-L/16, ImageNet-1k, 1600 epochs (published: 76.0 % linear); not run here."""
    return paper("L")


def mae_vith14() -> Recipe:
    """ViT-H/14, ImageNet-1k, 1600 epochs (published: 77.2 % linear); not run here."""
    return paper("H", 14)


RECIPES = {
    make.__name__: make
    for make in (mae_cifar10_cpu, mae_imagenette_cpu, mae_imagenette, mae_vitb16, mae_vitl16, mae_vith14)
}
