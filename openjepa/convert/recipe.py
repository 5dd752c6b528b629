"""The released YAML recipes, translated key by key: each is honoured, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openjepa.errors import UserError, nearest

SIZES = {"vit_tiny": "Ti", "vit_small": "S", "vit_base": "B", "vit_large": "L", "vit_huge": "H", "vit_giant": "G"}

# Released key to the recipe's. Those that map to None say where images and results lie, which the command line says,
# or change nothing here; the rest is translated by hand below.
PLAIN: dict[str, str | None] = {
    "data.color_jitter_strength": None,  # of the colour distortion, which is refused
    "data.crop_scale": "augment.crop_scale",
    "data.num_workers": "machine.workers",
    "data.image_folder": None,
    "data.root_path": None,
    "data.pin_mem": None,
    "logging.folder": None,
    "logging.write_tag": None,
    "mask.aspect_ratio": "masking.target_aspect",
    "mask.enc_mask_scale": "masking.context_scale",
    "mask.min_keep": "masking.min_keep",
    "mask.num_enc_masks": "masking.contexts",
    "mask.num_pred_masks": "masking.targets",
    "mask.patch_size": "model.patch_size",
    "mask.pred_mask_scale": "masking.target_scale",
    "meta.load_checkpoint": None,  # a RUN that exists goes on
    "meta.pred_depth": "predictor.depth",
    "meta.pred_emb_dim": "predictor.width",
    "optimization.ema": "schedule.ema",
    "optimization.epochs": "schedule.epochs",
    "optimization.final_lr": "optim.final_lr",
    "optimization.final_weight_decay": "optim.final_weight_decay",
    "optimization.ipe_scale": "schedule.horizon",
    "optimization.lr": "optim.lr",
    "optimization.start_lr": "optim.start_lr",
    "optimization.warmup": "schedule.warmup_epochs",
    "optimization.weight_decay": "optim.weight_decay",
}
BY_HAND = (
    "data.batch_size",
    "data.crop_size",
    "data.use_color_distortion",
    "data.use_gaussian_blur",
    "data.use_horizontal_flip",
    "mask.allow_overlap",
    "meta.copy_data",
    "meta.model_name",
    "meta.read_checkpoint",
    "meta.use_bfloat16",
)


def is_released(values: Any) -> bool:
    """Whether a YAML file speaks the release's language: our recipes have no part `meta` or `optimization`."""
    return isinstance(values, Mapping) and ("meta" in values or "optimization" in values)


REQUIRED = ("data.batch_size", "data.crop_size", "mask.patch_size", "meta.model_name")
SWITCHES = tuple(
    n for n in (*PLAIN, *BY_HAND) if n.partition(".")[2].startswith(("use_", "allow_", "copy_", "load_", "pin_"))
)
COUNTS = ("data.batch_size", "data.crop_size", "mask.patch_size")


def unsaid(values: Mapping[str, Any]) -> list[str]:
    """Keys that would change the result and are not there: our defaults, which are the release's, take their place."""
    given = flatten(values)
    return [name for name in (*PLAIN, *BY_HAND) if name not in given and PLAIN.get(name, "") is not None]


def in_their_words(message: str) -> str:
    """A refusal that names our key names the release's, too."""
    for theirs, ours in PLAIN.items():
        if ours and ours in message:
            return message.replace(ours, f"{theirs} ({ours})", 1)
    return message


def unused(values: Mapping[str, Any]) -> list[str]:
    """The keys of a released recipe that say what the command line says here, or change nothing."""
    return [name for name in flatten(values) if name in PLAIN and PLAIN[name] is None]


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A released recipe as one of ours, in plain dictionaries.

    The batch size stays the file's, which is one process's, where ours is a whole step's. Masks are in `released`
    behaviour and bf16 is taken at its word. Raises UserError for unknown keys and for what is not done here.
    """
    flat = flatten(values)
    for name in flat:
        if name not in PLAIN and name not in BY_HAND:
            raise UserError(f"unknown key '{name}' in a released recipe{nearest(name, [*PLAIN, *BY_HAND])}")
    for name in REQUIRED:
        if name not in flat:
            raise UserError(f"a released recipe needs '{name}', and this one has none")
    for kind, names, what in ((bool, SWITCHES, "true or false"), (int, COUNTS, "a whole number")):
        for name in names:
            if name in flat and type(flat[name]) is not kind:
                raise UserError(f"{name} is {flat[name]!r}: expected {what}")
    refusals = {
        "mask.allow_overlap": "contexts that overlap their targets are not drawn here: set it to false",
        "data.use_color_distortion": "no released recipe does and its mixture is not known here: set it to false and give "
        "--augment.jitter",
        "data.use_gaussian_blur": "no released recipe does and its strength is not known here: set it to false and give "
        "--augment.blur",
        "meta.copy_data": "nothing is copied to local disks here: set it to false",
        "meta.read_checkpoint": "to go on from a checkpoint, openjepa import FILE --out RUN first",
    }
    for name, reason in refusals.items():
        if flat.get(name):
            raise UserError(f"{name} is {flat[name]!r}: {reason}")
    tree: dict[str, Any] = {"masking": {"behaviour": "released"}}
    for name, value in flat.items():
        if target := PLAIN.get(name):
            put(tree, target, value)
    put(tree, "data.batch_size", flat["data.batch_size"])
    put(tree, "model.image_size", [flat["data.crop_size"]] * 2)
    size = str(flat["meta.model_name"])
    if size not in SIZES:
        raise UserError(f"meta.model_name is '{size}': one of {', '.join(SIZES)}{nearest(size, SIZES)}")
    put(tree, "model.size", SIZES[size])
    if "meta.use_bfloat16" in flat:
        put(tree, "precision", "bf16" if flat["meta.use_bfloat16"] else "fp32")
    if flat.get("data.use_horizontal_flip"):
        put(tree, "augment.flip", 0.5)
    return tree


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"mask": {"min_keep": 10}} to {"mask.min_keep": 10}."""
    flat: dict[str, Any] = {}
    for part, entries in values.items():
        if not isinstance(entries, Mapping):
            raise UserError(f"{part} is {entries!r} in a released recipe: expected keys and values")
        flat |= {f"{part}.{name}": value for name, value in entries.items()}
    return flat


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[name] = value
