"""The default recipe with Matryoshka prefixes: for features rather than for fidelity."""

from jumprelu_plugin.recipes.default import DEFAULT
from jumprelu_plugin.recipes.recipe import Recipe

MATRYOSHKA = Recipe(
    name="matryoshka",
    source="this package; measurements in docs/ablations.md; the prefixes: Bussmann et al. 2025 "
    "(arXiv 2503.17547)",
    description="Like `default`, and the first 1/32, 1/16 and 1/8 of the latents also learn to "
    "reconstruct alone. With fewer latents than features they split and absorb less; on language "
    "models' activations the whole dictionary reconstructs worse than with `default`.",
    sae={**DEFAULT.sae, "matryoshka_loss_weight": 0.5},
    runner=DEFAULT.runner,
    lr_from_size=DEFAULT.lr_from_size,
    lr_decay_fraction=DEFAULT.lr_decay_fraction,
)
