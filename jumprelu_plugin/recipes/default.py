"""This package's recipe: the user sets a target L0, and the rest is measured from the data."""

from jumprelu_plugin.recipes.recipe import Recipe

DEFAULT = Recipe(
    name="default",
    source="this package; measurements in docs/results.md",
    description="Set target_l0. Thresholds and bandwidth are calibrated on pre-activations, and "
    "the coefficient is measured as the multiplier of the target L0. The gradient also reaches "
    "the encoder, tokens of outlying norm weigh less, decoder rows have unit norm, and dead "
    "latents are resampled. JumpReLUTrainingSAEConfig does the same if only target_l0 is set; for "
    "text, the recipe adds a maximum latent density of 6 %, and a learning rate that follows the "
    "size of the run.",
    sae={
        "max_latent_density": 0.06,  # docs/results.md
    },
    runner={
        "train_batch_size_tokens": 2_048,
        "exclude_special_tokens": True,
    },
    lr_from_size=True,
    lr_decay_fraction=0.5,  # docs/ablations.md
)
