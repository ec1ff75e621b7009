"""Circuits through transcoders: circuit-tracer on a local model, and checks of its graphs."""

from jumprelu_plugin.circuits.graph_checks import (
    attribute,
    change_feature,
    replacement_model,
    row_sums,
    spliced_logits,
)

__all__ = ["attribute", "change_feature", "replacement_model", "row_sums", "spliced_logits"]
