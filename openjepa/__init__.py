"""openjepa: self-supervised image representations by prediction in representation space (I-JEPA)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "openjepa.recipes.exchange",
    "pretrain": "openjepa.recipes.pretrain",
    "IJEPA": "openjepa.methods.ijepa",
    "Masks": "openjepa.masking",
    "MaskingConfig": "openjepa.masking",
    "Recipe": "openjepa.recipes.recipe",
    "RECIPES": "openjepa.recipes.named",
    "ViT": "openjepa.models.vit",
    "ViTConfig": "openjepa.models.vit",
    "open_source": "openjepa.data.sources",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'openjepa' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
