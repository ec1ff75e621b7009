"""Circuits through transcoders: circuit-tracer on a local model, and checks of its graphs."""

from jumprelu_plugin.circuits.graph_checks import (
    FeatureChange,
    RowSums,
    change_feature,
    row_sums,
    spliced_logits,
)
from jumprelu_plugin.circuits.replacement_model import attribute, load_replacement_model

__all__ = [
    "FeatureChange",
    "RowSums",
    "attribute",
    "change_feature",
    "load_replacement_model",
    "row_sums",
    "spliced_logits",
]
