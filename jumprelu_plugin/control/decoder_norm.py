"""The decoder constraint of the JumpReLU paper: unit rows, and only tangential gradients.

"Jumping Ahead" (arXiv 2407.14435, appendix) keeps every decoder row at unit norm: before Adam, the
part of a row's gradient parallel to the row is removed; after Adam, the row is renormalised.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

PIECE_BYTES = 2**21


def keep_gradient_tangential(W_dec: nn.Parameter) -> None:
    """From now on, remove the parallel part of each row's gradient once it is accumulated."""
    W_dec.register_post_accumulate_grad_hook(_make_tangential)


@torch.no_grad()
def remove_parallel_gradient_(
    gradient: Float[Tensor, "d_sae d_out"], W_dec: Float[Tensor, "d_sae d_out"]
) -> None:
    """In place, take from each row of `gradient` its projection on the row of `W_dec` (unit)."""
    for piece, rows in zip(_in_pieces(gradient), _in_pieces(W_dec), strict=True):
        parallel = torch.linalg.vecdot(piece, rows)
        piece.addcmul_(parallel.unsqueeze(1), rows, value=-1.0)


@torch.no_grad()
def normalize_rows_(W_dec: Float[Tensor, "d_sae d_out"]) -> None:
    """In place, give every row unit norm; a row of zeros stays zero."""
    for piece in _in_pieces(W_dec):
        norms = torch.linalg.vector_norm(piece, dim=1, keepdim=True)
        piece.div_(norms.clamp_min(torch.finfo(W_dec.dtype).tiny))


def _in_pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows that stay in a CPU's cache between two passes over them; all of them on a GPU."""
    if matrix.device.type != "cpu":
        return (matrix,)
    return matrix.split(max(1, PIECE_BYTES // (matrix.element_size() * matrix.shape[1])))


def _make_tangential(W_dec: Tensor) -> None:
    if W_dec.grad is not None:
        remove_parallel_gradient_(W_dec.grad, W_dec.data)
