"""The recipe of Gemma Scope's transcoders: that of its SAEs, with the differences."""

from jumprelu_plugin.recipes.gemma_scope import GEMMA_SCOPE
from jumprelu_plugin.recipes.transcoder_recipe import TranscoderRecipe

GEMMA_SCOPE_TRANSCODER = TranscoderRecipe(
    name="gemma_scope_transcoder",
    source="Lieberum et al. 2024, Gemma Scope (arXiv 2408.05147), section 3 and its part on "
    "transcoders; otherwise gemma_scope",
    description="As in the paper: encoder and decoder are initialized independently, the encoder "
    "does not subtract b_dec, and input and target are each divided by their RMS. The input is "
    "the output of the pre-MLP RMSNorm with its gain folded into the MLP, "
    "blocks.L.ln2.hook_normalized; the output is blocks.L.hook_mlp_out.",
    sae={
        **GEMMA_SCOPE.sae,
        "apply_b_dec_to_input": False,  # Gemma Scope, transcoders: not subtracted
    },
    runner=GEMMA_SCOPE.runner,
)
