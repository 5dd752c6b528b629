"""What a run begins with instead of chance: the networks of another run, or of weights from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from openjepa.convert import formats
from openjepa.convert.names import Told
from openjepa.errors import UserError
from openjepa.methods.method import Method
from openjepa.models.vit import ViTConfig
from openjepa.models.weights import load_strict
from openjepa.recipes.exchange import is_run, load_run
from openjepa.recipes.recipe import Recipe, differing_encoders


def begin_with(method: Method, recipe: Recipe, source: str) -> str:
    """Give a new run's networks the weights of a source. Returns what to tell. Raises UserError.

    Of a run or a file of the same method all networks; of any other its encoder, the target encoder where there is one,
    which then is also what follows the encoder. Step, schedule and optimiser begin anew.
    """
    model, theirs = networks_of(source, recipe)
    if changed := differing_encoders(model, recipe.model):
        raise UserError(f"{source} is not of this recipe (its own -> the recipe's: {'; '.join(changed)})")
    mine = dict(method.named_children())
    if "encoder" not in mine:
        raise UserError(f"{recipe.method} trains no encoder that could begin with that of {source}")
    if len(theirs) == 1 or not theirs.keys() <= mine.keys():
        alone = theirs.get("target_encoder") or theirs.get("encoder") or next(iter(theirs.values()))
        theirs = dict.fromkeys(method.encoders(), alone)
    for name, weights in theirs.items():
        load_strict(mine[name], weights, f"{source}'s {name}")
    anew = [name for name, network in mine.items() if name not in theirs and [*network.parameters()]]
    return f"beginning with {source}: {', '.join(theirs)}" + (f"; anew: {', '.join(anew)}" if anew else "")


def networks_of(source: str, recipe: Recipe) -> tuple[ViTConfig, Mapping[str, Mapping[str, Tensor]]]:
    """The encoder's configuration and all networks' weights, by name; of a run of another method its encoder alone."""
    if is_run(Path(source)):
        found = load_run(source)
        same = found.recipe.method == recipe.method
        networks = dict(found.method.named_children()) if same else {"encoder": found.method.product}
        return found.recipe.model, {name: network.state_dict() for name, network in networks.items()}
    told = Told(recipe.model.heads, recipe.model.image_size, recipe.mae.decoder_heads)
    imported = formats.read(source, told)
    return imported.model, imported.weights
