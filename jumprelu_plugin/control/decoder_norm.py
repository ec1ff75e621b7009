"""The decoder constraint of the JumpReLU paper: unit rows, and only tangential gradients.

"Jumping Ahead" (arXiv 2407.14435, appendix) keeps every decoder row at unit norm: before Adam, the
part of a row's gradient parallel to the row is removed; after Adam, the row is renormalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

PIECE_BYTES = 2**21
# A kernel holds a row in registers.
LONGEST_KERNEL_ROW = 2**15


def keep_gradient_tangential(
    W_dec: nn.Parameter, by_kernels: Callable[[], bool] = lambda: False
) -> None:
    """From now on, remove the parallel part of each row's gradient once it is accumulated.

    Args:
        by_kernels: asked at each gradient whether to use the kernels of `step.kernels.rows`.
    """

    def make_tangential(parameter: Tensor) -> None:
        if parameter.grad is not None:
            remove_parallel_gradient_(parameter.grad, parameter.data, by_kernels())

    W_dec.register_post_accumulate_grad_hook(make_tangential)


@torch.no_grad()
def remove_parallel_gradient_(
    gradient: Float[Tensor, "d_sae d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
    by_kernels: bool = False,
) -> None:
    """In place, take from each row of `gradient` its projection on the row of `W_dec` (unit)."""
    if by_kernels and _kernels_take(gradient) and _kernels_take(W_dec):
        from jumprelu_plugin.step.kernels import rows  # imports Triton

        rows.remove_parallel_gradient_(gradient, W_dec)
        return
    for piece, unit in zip(_in_pieces(gradient), _in_pieces(W_dec), strict=True):
        parallel = torch.linalg.vecdot(piece, unit)
        piece.addcmul_(parallel.unsqueeze(1), unit, value=-1.0)


@torch.no_grad()
def normalize_rows_(W_dec: Float[Tensor, "d_sae d_out"], by_kernels: bool = False) -> None:
    """In place, give every row unit norm; a row of zeros stays zero."""
    if by_kernels and _kernels_take(W_dec):
        from jumprelu_plugin.step.kernels import rows  # imports Triton

        rows.normalize_rows_(W_dec)
        return
    for piece in _in_pieces(W_dec):
        norms = torch.linalg.vector_norm(piece, dim=1, keepdim=True)
        piece.div_(norms.clamp_min(torch.finfo(W_dec.dtype).tiny))


def _kernels_take(matrix: Tensor) -> bool:
    """Whether the kernels of `step.kernels.rows` can work on this matrix."""
    short_enough = matrix.shape[1] <= LONGEST_KERNEL_ROW
    return matrix.dtype == torch.float32 and matrix.is_contiguous() and short_enough


def _in_pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows that stay in a CPU's cache between two passes over them; all of them on a GPU."""
    if matrix.device.type != "cpu":
        return (matrix,)
    return matrix.split(max(1, PIECE_BYTES // (matrix.element_size() * matrix.shape[1])))
