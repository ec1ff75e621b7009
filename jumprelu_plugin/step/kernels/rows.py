"""The decoder constraint by kernels: unit rows, and only tangential gradients.

Each row is read once and stays in registers between its sum and its update, where PyTorch's
operators read it twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.step.kernels.tuning import jit


@jit
def _tangential_kernel(gradient, matrix, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    g = tl.load(gradient + at, mask=inside, other=0.0)
    w = tl.load(matrix + at, mask=inside, other=0.0)
    tl.store(gradient + at, g - tl.sum(g * w, 0) * w, mask=inside)


@jit
def _unit_rows_kernel(matrix, columns, smallest, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    w = tl.load(matrix + at, mask=inside, other=0.0)
    # Scaled first, so that the squares of a very long or short row stay finite and above zero.
    largest = tl.maximum(tl.max(tl.abs(w), 0), smallest)
    scaled = w / largest
    norm = tl.sqrt(tl.sum(scaled * scaled, 0))
    tl.store(matrix + at, scaled / tl.maximum(norm, smallest), mask=inside)


def remove_parallel_gradient_(
    gradient: Float[Tensor, "rows columns"], matrix: Float[Tensor, "rows columns"]
) -> None:
    """In place, take from each row of `gradient` its projection on the row of `matrix` (unit)."""
    rows, columns = matrix.shape
    _tangential_kernel[(rows,)](
        gradient, matrix, columns, BLOCK=triton.next_power_of_2(columns), num_warps=8
    )


def normalize_rows_(matrix: Float[Tensor, "rows columns"]) -> None:
    """In place, give every row unit norm; a row of zeros stays zero."""
    rows, columns = matrix.shape
    smallest = torch.finfo(matrix.dtype).tiny
    _unit_rows_kernel[(rows,)](
        matrix, columns, smallest, BLOCK=triton.next_power_of_2(columns), num_warps=8
    )
