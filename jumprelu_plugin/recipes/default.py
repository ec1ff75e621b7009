"""Our recipe: ask for an L0, and everything else is found from the data."""

from jumprelu_plugin.recipes.recipe import Recipe

DEFAULT = Recipe(
    name="default",
    source="this package; measurements in docs/results.md",
    about="Give target_l0. Thresholds and bandwidth come from the data's own pre-activations, the "
    "coefficient is measured as the multiplier of the target L0, gradient reaches the encoder too, "
    "inner dictionaries rebuild the input too, tokens of huge norm count less, decoder rows are "
    "unit vectors, dead latents restart. JumpReLUTrainingSAEConfig does this when only target_l0 "
    "is given; for text, the recipe adds a ceiling of 6 % on how often a latent fires.",
    sae={
        "max_latent_density": 0.06,  # docs/results.md
    },
    runner={
        "lr": 3e-3,  # docs/results.md
        "train_batch_size_tokens": 2_048,
        "exclude_special_tokens": True,
    },
    decay_share=0.2,
)
