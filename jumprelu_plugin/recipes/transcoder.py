"""Our recipe for transcoders: ask for an L0, and everything else is found from the data."""

from jumprelu_plugin.recipes.default import DEFAULT
from jumprelu_plugin.recipes.transcoder_recipe import TranscoderRecipe

TRANSCODER = TranscoderRecipe(
    name="transcoder",
    source="this package; measurements in docs/transcoders.md",
    about="Give target_l0 and an output hook. As `default`, with input and target each on its own "
    "scale, b_dec starting at the target's mean and each decoder row at the mean of the target "
    "where its latent fires.",
    sae={},
    runner=DEFAULT.runner,
)
