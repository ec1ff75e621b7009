"""The cross-layer transcoder: each layer's latents write to the MLP outputs of its own and all
later layers (Ameisen et al., "Circuit Tracing", Anthropic 2025, section 2)."""

from jumprelu_plugin.transcoders.clt.config import CLTConfig, CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.evaluation import evaluate_clt
from jumprelu_plugin.transcoders.clt.folder import load_clt, save_clt
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder

__all__ = [
    "CLTConfig",
    "CLTTrainingConfig",
    "CrossLayerTranscoder",
    "evaluate_clt",
    "load_clt",
    "save_clt",
]
