"""Our recipe: ask for an L0, and everything else is found from the data."""

from jumprelu_plugin.recipes.recipe import Recipe

DEFAULT = Recipe(
    name="default",
    source="this package; measurements in docs/recipes.md",
    about="Give target_l0. Thresholds and bandwidth come from the data's own pre-activations, the "
    "coefficient is steered until L0 holds the target, gradient reaches the encoder too, decoder "
    "rows are unit vectors. What JumpReLUTrainingSAEConfig does when only target_l0 is given.",
    sae={},
    runner={
        "lr": 1e-3,  # best of 3e-4, 1e-3, 3e-3 in runs of 1,000 steps (docs/recipes.md)
        "train_batch_size_tokens": 2_048,
        "exclude_special_tokens": True,
    },
)
