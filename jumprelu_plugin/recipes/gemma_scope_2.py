"""The recipe of Gemma Scope 2, as far as it is published."""

from jumprelu_plugin.recipes.gemma_scope import GEMMA_SCOPE
from jumprelu_plugin.recipes.recipe import Recipe

GEMMA_SCOPE_2 = Recipe(
    name="gemma_scope_2",
    source="McDougall et al. 2025, Gemma Scope 2 technical report; for what it does not say, "
    "gemma_scope and the sources beside each number",
    description="Gemma Scope with an L0 penalty whose minimum is at target_l0, a penalty on dense "
    "latents, and Matryoshka prefixes. Not published, and chosen here: the coefficient, the form "
    "and scale of the density penalty, and the widths and weights of the prefixes. It is meant "
    "for billions of tokens, like gemma_scope.",
    sae={
        **GEMMA_SCOPE.sae,  # E‖x‖² = 1, ε = θ₀ = 0.001, log θ, unit rows, gradients for θ only
        "jumprelu_sparsity_loss_mode": "quadratic",  # report: (2/L0*)(L0 - L0*)²
        "target_l0": 50.0,  # report: 10, 50, 100 or 150
        # Not published. At an L0 5 % too high, the slope of the penalty in L0 is then that of
        # gemma_scope: 6e-4 = λ · 4 · 0.05.
        "l0_coefficient": 3e-3,
        "l0_warm_up_steps": 50_000,  # report
        # The report says that there is a penalty on dense latents. Its form (WithDensityPenalty)
        # and w₀ are those of the authors' progress update of March 2025.
        "density_penalty_scale": 0.01,
    },
    runner=GEMMA_SCOPE.runner,  # report: same
    # The report says that it uses Matryoshka prefixes, without details. These are those of Bussmann
    # et al. (arXiv 2503.17547): blocks of 1/32, 1/16, 1/8, 1/4 and the rest, with equal weights.
    matryoshka_fractions=(1 / 32, 3 / 32, 7 / 32, 15 / 32),
)
