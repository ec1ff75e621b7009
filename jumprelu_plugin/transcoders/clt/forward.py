"""One forward pass of training: every layer's latents, and all outputs from them.

Each layer is encoded and decoded by the exact step of an SAE (`step/`), whose decoder is as wide as
all the outputs it writes to. The outputs are one tensor, [batch, layers · d_out].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from jumprelu_plugin.step.encoding import encode
from jumprelu_plugin.step.kernels.buffers import PairBuffers
from jumprelu_plugin.step.losses import Step
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder


class _SumOfLater(torch.autograd.Function):
    """Adds up what the layers write: the l-th to the columns from its own layer's to the last."""

    @staticmethod
    def forward(ctx: Any, *written: Tensor) -> Tensor:
        total = written[0].clone()
        for part in written[1:]:
            total[:, -part.shape[1] :] += part
        ctx.widths = [part.shape[1] for part in written]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad[:, -width:] for width in ctx.widths)


def forward(
    model: CrossLayerTranscoder,
    inputs: Sequence[Float[Tensor, "batch d_in"]],
    bandwidths: Sequence[float],
    *,
    path: str = "sparse",
    buffers: Sequence[PairBuffers] | None = None,
    to_input: float = 1.0,
    multipliers: Sequence[Float[Tensor, " d_sae"] | None] | None = None,
    processes: OneProcess = ONE_PROCESS,
) -> tuple[list[Step], Float[Tensor, "batch layers*d_out"]]:
    """What the loss needs of each layer, and ŷ of all layers side by side.

    Args:
        inputs: x of each layer.
        bandwidths: ε of each layer.
        path: `sparse`, `screened`, `triton` or `dense`; all give the same numbers.
        buffers: of each layer's pairs, for `triton`.
        to_input: the share of the estimators' gradient that the encoders receive.
        multipliers: of each layer's density limit; None where no layer has one.
        processes: that hold the latents and split the batch. What is returned of a layer is of this
            one's latents; ŷ is of all latents, for this one's tokens.
    """
    steps, written = [], []
    multipliers = [None] * len(bandwidths) if multipliers is None else multipliers
    buffers = [PairBuffers() for _ in bandwidths] if buffers is None else buffers
    layers = zip(model.sources, inputs, bandwidths, multipliers, buffers, strict=True)
    for source, x, bandwidth, of_limit, room in layers:
        # A node of its own in the graph, so that the gradient of θ can be hooked.
        threshold = source.threshold.view(-1)
        entries = encode(path, x, source.W_enc, source.b_enc, None, threshold, bandwidth, room)
        activations = entries.activations(threshold, bandwidth, to_input)
        step = Step(
            entries,
            activations,
            threshold,
            bandwidth,
            to_input,
            source.W_dec,
            density_multipliers=of_limit,
        )
        steps.append(step)
        written.append(entries.decode(activations, source.W_dec))
    biases = torch.cat([source.b_dec for source in model.sources])
    total: Tensor = _SumOfLater.apply(*written)  # type: ignore[assignment]
    return steps, processes.sum_over_shards(total) + biases
