"""I-JEPA recipes: the paper's, the released ones, and those that a CPU can run."""

from __future__ import annotations

from openjepa.data.augment import AugmentConfig
from openjepa.data.stream import DataConfig
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.recipe import Recipe


def ijepa_scenes() -> Recipe:
    """What `openjepa demo` runs: 64-pixel scenes, minutes on 2 cores."""
    return Recipe(
        model=ViTConfig(size="Ti", image_size=(64, 64), patch_size=8, depth=6),
        predictor=PredictorConfig(width=96, depth=3),
        data=DataConfig(batch_size=64),
        augment=AugmentConfig(crop_scale=(0.3, 1.0)),
        optim=OptimConfig(lr=5e-4, start_lr=5e-5, weight_decay=0.04, final_weight_decay=0.04),
        schedule=ScheduleConfig(epochs=5, warmup_epochs=0.5, ema=(0.996, 1.0)),
        monitors=MonitorsConfig(log_every=50, knn_every=0),
    )


def ijepa_cifar10_cpu() -> Recipe:
    """32-pixel images, 30 minutes on 2 cores."""
    return Recipe(
        model=ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6),
        predictor=PredictorConfig(width=96, depth=3),
        data=DataConfig(batch_size=64),
        optim=OptimConfig(lr=5e-4, start_lr=5e-5, weight_decay=0.04, final_weight_decay=0.04),
        schedule=ScheduleConfig(epochs=7, warmup_epochs=0.5, ema=(0.996, 1.0)),
    )


RECIPES = {f.__name__: f for f in (ijepa_scenes, ijepa_cifar10_cpu)}
