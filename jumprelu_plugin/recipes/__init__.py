"""Published training recipes as frozen data: one file each, a citation beside every number."""

from __future__ import annotations

from jumprelu_plugin.recipes.default import DEFAULT
from jumprelu_plugin.recipes.gemma_scope import GEMMA_SCOPE
from jumprelu_plugin.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (DEFAULT, GEMMA_SCOPE)}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[name]


__all__ = ["DEFAULT", "GEMMA_SCOPE", "RECIPES", "Recipe", "recipe"]
