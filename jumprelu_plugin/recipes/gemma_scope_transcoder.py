"""Gemma Scope's transcoders: their SAEs' recipe, with what differs."""

from jumprelu_plugin.recipes.gemma_scope import GEMMA_SCOPE
from jumprelu_plugin.recipes.transcoder_recipe import TranscoderRecipe

GEMMA_SCOPE_TRANSCODER = TranscoderRecipe(
    name="gemma_scope_transcoder",
    source="Lieberum et al. 2024, Gemma Scope (arXiv 2408.05147), section 3 and its part on "
    "transcoders; the rest as gemma_scope",
    about="The paper's: encoder and decoder drawn apart, no b_dec on the input, input and target "
    "each divided by its own RMS. Its input is the pre-MLP RMSNorm's output with the gain folded "
    "into what follows, which is blocks.L.ln2.hook_normalized; its output blocks.L.hook_mlp_out.",
    sae={
        **GEMMA_SCOPE.sae,
        "apply_b_dec_to_input": False,  # Gemma Scope, transcoders: not subtracted
    },
    runner=GEMMA_SCOPE.runner,
)
