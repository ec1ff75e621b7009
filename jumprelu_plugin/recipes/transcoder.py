"""This package's recipe for transcoders: the user sets a target L0, and the rest is measured."""

from jumprelu_plugin.control.learning_rate import HIGHEST_OF_TRANSCODERS
from jumprelu_plugin.recipes.default import DEFAULT
from jumprelu_plugin.recipes.transcoder_recipe import TranscoderRecipe

TRANSCODER = TranscoderRecipe(
    name="transcoder",
    source="this package; measurements in docs/guides/transcoders-and-clt.md",
    description="Set target_l0 and an output hook. Like `default`, with a scale each for input and "
    "target; b_dec starts at the target's mean, and each decoder row at the mean of the target "
    "where its latent fires.",
    sae={},
    runner={
        **DEFAULT.runner,
        # Measured apart from the SAEs': on layer 4 of the embedded Gemma 2 (d_sae 2048, 400k
        # tokens in steps of 1,024, one seed), lr 4e-4, 1e-3, 2e-3 and 4e-3 gave held-out FVU 0.633,
        # 0.512, 0.439 and 0.358 at L0 24.6 to 26.5, with an earlier way to measure λ.
        "lr": HIGHEST_OF_TRANSCODERS,
    },
    lr_decay_fraction=0.2,
)
