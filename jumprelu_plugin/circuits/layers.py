"""A common interface to circuit-tracer's transcoder sets and cross-layer transcoders."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.transcoders.clt.running_outputs import RunningOutputs


def is_cross_layer(transcoders: Any) -> bool:
    """Whether it is a cross-layer transcoder; a set is iterable."""
    return not hasattr(transcoders, "__iter__")


def layers_and_width(transcoders: Any) -> tuple[int, int]:
    """The number of layers, and d_model."""
    if is_cross_layer(transcoders):
        return transcoders.n_layers, transcoders.d_model
    return len(transcoders), transcoders[0].d_model


def encoder(transcoders: Any, layer: int) -> Float[Tensor, "d_sae d_model"]:
    """The encoder vectors of a layer's features."""
    if is_cross_layer(transcoders):
        return transcoders._get_encoder_weights(layer)
    return transcoders[layer].W_enc


def output_bias(transcoders: Any, layer: int) -> Float[Tensor, " d_model"]:
    """b_dec of a layer's output."""
    return transcoders.b_dec[layer] if is_cross_layer(transcoders) else transcoders[layer].b_dec


class LayerOutputs:
    """The transcoders' output at each layer, computed layer by layer during a forward pass.

    Args:
        transcoders: circuit-tracer's set or cross-layer transcoder.
    """

    def __init__(self, transcoders: Any):
        self._transcoders = transcoders
        self._running = RunningOutputs()

    def next(self, layer: int, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """The output at the next layer, from its features and those of earlier layers."""
        transcoders = self._transcoders
        if not is_cross_layer(transcoders):
            return transcoders[layer](x)
        features = transcoders.encode_layer(x, layer)
        active = features.any(0).nonzero().flatten()
        vectors = transcoders._get_decoder_vectors(layer, active)  # [active, later, d_model]
        written = torch.einsum("pf,fld->lpd", features[:, active], vectors)
        output = self._running.take(layer, written) + transcoders.b_dec[layer]
        if transcoders.W_skip is not None:
            output = output + transcoders.compute_skip(layer, x)
        return output
