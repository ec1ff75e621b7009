"""Training recipes as frozen data: one file each, with the source beside every number."""

from __future__ import annotations

from jumprelu_plugin.recipes.anthropic_2025 import ANTHROPIC_2025
from jumprelu_plugin.recipes.default import DEFAULT
from jumprelu_plugin.recipes.gemma_scope import GEMMA_SCOPE
from jumprelu_plugin.recipes.gemma_scope_2 import GEMMA_SCOPE_2
from jumprelu_plugin.recipes.gemma_scope_transcoder import GEMMA_SCOPE_TRANSCODER
from jumprelu_plugin.recipes.matryoshka import MATRYOSHKA
from jumprelu_plugin.recipes.recipe import Recipe
from jumprelu_plugin.recipes.transcoder import TRANSCODER
from jumprelu_plugin.recipes.transcoder_recipe import TranscoderRecipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        DEFAULT,
        GEMMA_SCOPE,
        GEMMA_SCOPE_2,
        ANTHROPIC_2025,
        MATRYOSHKA,
        TRANSCODER,
        GEMMA_SCOPE_TRANSCODER,
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: there is none; the message lists all recipes.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[name]


def get_transcoder_recipe(name: str) -> TranscoderRecipe:
    """The recipe of this name for transcoders.

    Raises:
        ValueError: there is none; the message lists all recipes for transcoders.
    """
    recipe = RECIPES.get(name)
    if not isinstance(recipe, TranscoderRecipe):
        names = [other.name for other in RECIPES.values() if isinstance(other, TranscoderRecipe)]
        raise ValueError(
            f"there is no recipe {name!r} for transcoders; there are: {', '.join(names)}"
        )
    return recipe


__all__ = [
    "ANTHROPIC_2025",
    "DEFAULT",
    "GEMMA_SCOPE",
    "GEMMA_SCOPE_2",
    "GEMMA_SCOPE_TRANSCODER",
    "MATRYOSHKA",
    "RECIPES",
    "TRANSCODER",
    "Recipe",
    "TranscoderRecipe",
    "get_recipe",
    "get_transcoder_recipe",
]
