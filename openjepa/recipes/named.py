"""Every recipe by its name."""

from openjepa.recipes import ibot, ijepa, mae

RECIPES = {**ijepa.RECIPES, **mae.RECIPES, **ibot.RECIPES}
