"""The methods by name: what of a recipe each reads, how it is built, and the views that it learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from openjepa import masking
from openjepa.data.augment import AugmentConfig
from openjepa.data.stream import Batch, Views
from openjepa.decoder.condition import Condition
from openjepa.decoder.rcdm import RCDM, RCDMConfig
from openjepa.errors import UserError
from openjepa.masking import Masks, TokenMasks, hide_tokens, sample_share
from openjepa.methods.ibot import IBOT
from openjepa.methods.ijepa import IJEPA
from openjepa.methods.mae import MAE, MASKING
from openjepa.methods.method import Method

if TYPE_CHECKING:
    from openjepa.recipes.exchange import Trained
    from openjepa.recipes.recipe import Recipe


# iBOT's first large crop
DISTORTED = AugmentConfig(crop_scale=(0.25, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=1.0)
MOST_PIXELS = 2e9  # of all crops of a part of a step on one process, kept until it is done


@dataclass(frozen=True)
class Family:
    """What the rest of the code knows of a method."""

    kind: type[Method]
    parts: tuple[str, ...]  # of a recipe that it reads and some other method does not
    build: Callable[[Recipe], Method]
    views: Callable[[Recipe], Views]
    check: Callable[[Recipe], None] = lambda recipe: None  # raises UserError for values that do not go together
    class_token: bool = False  # that its encoder has unless told otherwise
    begins: Mapping[str, Any] = field(default_factory=dict)  # parts of a recipe that was another method's


def one_view(recipe: Recipe) -> Views:
    """A crop of every image, with visible and hidden patches."""
    masks = partial(sample_share, recipe.masking, recipe.model.grid)
    return Views((recipe.augment,), recipe.model.image_size, recipe.model.channels, masks)


def many_views(recipe: Recipe) -> Views:
    """Two large crops of every image with hidden patches, where these are asked about, and small ones."""
    crops = recipe.crops
    hidden = recipe.token_masking if recipe.ibot.patch_weight else replace(recipe.token_masking, masked=0.0)
    masks = partial(hide_tokens, hidden, recipe.model.grid, 2)
    return Views(
        crops.large(recipe.augment), recipe.model.image_size, recipe.model.channels, masks,
        crops.little(recipe.augment), crops.small, small_crop(recipe),
    )  # fmt: skip


def small_crop(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the small crops: of the large ones 96 of 224 pixels, as published, in whole patches, unless told."""
    rows, columns = (-(-side * 96 // 224) * recipe.model.patch_size for side in recipe.model.grid)
    return recipe.crops.small_size or (rows, columns)


def check_ijepa(recipe: Recipe) -> None:
    if recipe.loss.regularised and recipe.data.batch_size < 2 * recipe.optim.accumulate:
        raise UserError("loss.variance and loss.covariance need parts of 2 images or more: lower optim.accumulate")
    if recipe.masking.context == "packed":
        if recipe.model.class_token or recipe.model.registers:
            raise UserError("masking.context 'packed' does not go with model.class_token or registers: use 'even'")
        if recipe.masking.contexts > 1:
            raise UserError("masking.context 'packed' takes one context block: set masking.contexts 1 or use 'even'")
        if recipe.predictor.context == "shared":
            raise UserError("masking.context 'packed' does not go with predictor.context 'shared': use 'even'")
    masking.check(recipe.masking, recipe.model.grid)


def check_mae(recipe: Recipe) -> None:
    if recipe.masking.strategy not in ("random", "block") or recipe.masking.context == "packed":
        raise UserError(
            "mae paints all that is hidden from all that is visible: masking.strategy random or block, masking.context even"
        )
    for name in ("targets", "target_scale", "contexts", "context_scale", "context_aspect"):
        if getattr(recipe.masking, name) != getattr(MASKING, name):
            raise UserError(f"masking.{name} says nothing to mae: set masking.hidden and masking.strategy")
    masking.check(recipe.masking, recipe.model.grid)


def check_ibot(recipe: Recipe) -> None:
    if not recipe.model.class_token:
        raise UserError("ibot compares class tokens: set model.class_token true")
    patch, small, epochs = recipe.model.patch_size, recipe.crops.small, recipe.schedule.epochs
    (height, width), (h, w) = recipe.model.image_size, small_crop(recipe)
    if small and (h % patch or w % patch):
        raise UserError(f"crops.small_size {h}x{w} does not divide into patches of {patch} pixels")
    if small and h * w >= height * width:
        raise UserError(
            f"crops.small_size {h}x{w} is no smaller than the large crops, {height}x{width} (model.image_size)"
        )
    if (frozen := recipe.ibot.freeze_last_layer_epochs) and frozen >= epochs:
        raise UserError(
            f"ibot.freeze_last_layer_epochs ({frozen:g}) must be shorter than the run ({epochs:g} epochs): no prototype would move"
        )
    if (rise := recipe.ibot.temperature_epochs) and rise > epochs:
        raise UserError(
            f"ibot.temperature_epochs ({rise:g}) must be no longer than the run ({epochs:g} epochs): it would not end"
        )
    if not recipe.ibot.patch_weight:
        return
    if not recipe.token_masking.masked:
        raise UserError("token_masking.masked 0 hides no patch: raise it, or set ibot.patch_weight 0")
    masking.check_tokens(recipe.token_masking, recipe.model.grid)


def refuse_many_pixels(recipe: Recipe, images: int) -> None:
    """Raises UserError for more crops than a part of a step, of so many images, can hold."""
    views = METHODS[recipe.method].views(recipe)
    sizes = [size for _, size in views.kinds()]
    if (pixels := images * sum(h * w for h, w in sizes)) > MOST_PIXELS:
        crops = " and ".join(f"{sizes.count(size)} of {size[0]}x{size[1]}" for size in dict.fromkeys(sizes))
        fewer = "crops.small or data.batch_size" if views.smalls else "data.batch_size"
        raise UserError(
            f"{images} images with crops, {crops}, have {pixels / 1e9:.1f} billion pixels, more than {MOST_PIXELS / 1e9:g}: lower "
            f"{fewer}, or raise optim.accumulate"
        )


def check_rcdm(recipe: Recipe) -> None:
    masking.check(recipe.masking, recipe.model.grid)


def decoder(recipe: Recipe) -> RCDM:
    """Of the run that the recipe names. Raises UserError where it is not there, or another."""
    from openjepa.recipes.exchange import load_run  # which builds methods

    if not recipe.rcdm.run:
        raise UserError("a decoder is made for a run: openjepa decode train RUN --data SPEC --out DECODER")
    return decoder_of(recipe, load_run(recipe.rcdm.run))


def decoder_of(recipe: Recipe, run: Trained) -> RCDM:
    """With the recipe's initial weights, told by a run's networks. Raises UserError for a run that it was not made for."""
    refuse_another(recipe.rcdm, run)
    begun = recipe.rcdm.networks == "random"
    networks = METHODS[run.recipe.method].build(run.recipe) if begun else run.method
    return RCDM(recipe.rcdm, Condition(networks, recipe.rcdm.of), run.normalise)


def refuse_another(config: RCDMConfig, run: Trained) -> None:
    """Raises UserError for a run that a decoder was not made for."""
    if (found := run.fingerprint()) != config.fingerprint:
        raise UserError(
            f"this decoder was made for another encoder, step {config.step} of {config.run} (fingerprint {config.fingerprint}), "
            f"and {run.run} is at step {run.step} ({found}): give that run or its checkpoint, or train a decoder for this one"
        )


def inputs(batch: Batch, normalise: nn.Module) -> tuple[Tensor, Masks | TokenMasks, Tensor | None]:
    """What a method's forward takes, of a batch on the device."""

    def each(images: Tensor) -> Tensor:
        """[..., channels, H, W]"""
        return cast(Tensor, normalise(images.flatten(0, -4)).unflatten(0, images.shape[:-3]))

    return each(batch.images), batch.masks, None if batch.small is None else each(batch.small)


METHODS = {
    "ijepa": Family(
        IJEPA, ("predictor", "loss", "masking"), lambda r: IJEPA(r.model, r.predictor, r.loss), one_view, check_ijepa
    ),
    "mae": Family(
        MAE,
        ("mae", "masking"),
        lambda r: MAE(r.model, r.mae),
        one_view,
        check_mae,
        class_token=True,
        begins={"masking": MASKING},
    ),
    "ibot": Family(
        IBOT,
        ("ibot", "crops", "token_masking"),
        lambda r: IBOT(r.model, r.ibot.of_run(r.schedule.epochs)),
        many_views,
        check_ibot,
        class_token=True,
        begins={"augment": DISTORTED},  # views that differ by their place alone would agree at once
    ),
    "rcdm": Family(RCDM, ("rcdm", "masking"), decoder, one_view, check_rcdm),
}


def parts() -> set[str]:
    """Those parts of a recipe that not every method reads."""
    return {part for family in METHODS.values() for part in family.parts}


def starting(recipe: Recipe, name: str) -> Recipe:
    """A recipe of another method: what all share stays, what is the method's own begins anew."""
    shared = {f: getattr(recipe, f) for f in recipe.__dataclass_fields__ if f not in (*parts(), "method")}
    family = METHODS[name]
    shared["model"] = replace(recipe.model, class_token=family.class_token)
    shared["first"] = {}  # of the other method's, whose encoder is another
    return type(recipe)(method=name, **{**shared, **family.begins})
