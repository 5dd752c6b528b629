"""Every recipe by its name."""

from openjepa.recipes import decoder, ibot, ijepa, mae

RECIPES = {**ijepa.RECIPES, **mae.RECIPES, **ibot.RECIPES, **decoder.RECIPES}
