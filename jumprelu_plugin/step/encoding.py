"""Pre-activations by the path that a step takes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.step.dense import encode_dense
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.kernels.buffers import PairBuffers
from jumprelu_plugin.step.sparse import encode_sparse


def encode(
    path: str,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"] | None,
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    buffers: PairBuffers,
    *,
    keep_mean: bool = False,
) -> Entries:
    """z = (x - b_pre) W_enc + b_enc, at every pair or at those that can contribute to the step.

    Args:
        path: of `choose.StepPath`. The kernels compute in float32, so `triton` is `screened` in
            any other dtype.
        x, W_enc, b_enc, b_pre, threshold, bandwidth, keep_mean: as in `sparse.encode_sparse`.
        buffers: the size of this dictionary's buffers, for `triton`.
    """
    if path == "dense":
        return encode_dense(x, W_enc, b_enc, b_pre)
    inputs = (x, W_enc, b_enc, b_pre, threshold, bandwidth)
    if path == "triton" and x.dtype == torch.float32:
        from jumprelu_plugin.step.kernels.entries import encode_buffered  # imports Triton

        return encode_buffered(*inputs, buffers, keep_mean=keep_mean)
    return encode_sparse(*inputs, screen=path != "sparse", keep_mean=keep_mean)
