"""The cross-layer transcoder: each layer's latents write to the MLP outputs of its own and all
later layers (Ameisen et al., "Circuit Tracing", Anthropic 2025, section 2)."""

from jumprelu_plugin.cross_layer.config import CrossLayerConfig, CrossLayerTrainingConfig
from jumprelu_plugin.cross_layer.evaluation import evaluate_cross_layer
from jumprelu_plugin.cross_layer.folder import load, save
from jumprelu_plugin.cross_layer.model import CrossLayerTranscoder

__all__ = [
    "CrossLayerConfig",
    "CrossLayerTrainingConfig",
    "CrossLayerTranscoder",
    "evaluate_cross_layer",
    "load",
    "save",
]
