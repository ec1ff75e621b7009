"""Find the pairs (token, latent) whose pre-activation lies above an edge, and their values.

Two ways, the same set:

`select_directly` computes every pre-activation in the precision of the weights and compares.

`select_by_screening` computes every one in bfloat16 first, where matrix units are several times
faster, together with a bound on what rounding can have done to it, and computes again, in full
precision, only the pairs that could lie above the edge. With a, w the float vectors and a', w'
their bfloat16 roundings,

    |a·w - a'·w'|  ≤  ‖a - a'‖ ‖w'‖ + ‖a‖ ‖w - w'‖

(Cauchy-Schwarz), plus the rounding of the products' float32 sum. The bound is itself an inner
product, so it is computed by the same matrix product, in two extra columns: what comes out is an
upper bound of every pre-activation.

A pre-activation within rounding of an edge could fall on either side of it, depending on the order
of a sum. Both ways take those values from one routine (`Pattern.sampled_product`), so that they
agree on every pair: which are kept, which are active, and which lie in the window.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.step.pattern import Pattern

Selection = tuple[Pattern, Float[Tensor, " nnz"]]
Screening = Literal["none", "bfloat16"]

# 16 MB of float32 pre-activations: large enough that the product runs at the speed of the whole
# one, small enough that selecting from it reads cache, not memory.
DEFAULT_CHUNK_ELEMENTS = 2**22

# Rounding to bfloat16 moves a value by at most this share of it (8 significant bits).
_BFLOAT16_ROUNDING = 2.0**-8
_FLOAT32_ROUNDING = 2.0**-24


@torch.no_grad()
def select_directly(
    centred: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    edges: Float[Tensor, "edges d_sae"],
    chunk_elements: int = DEFAULT_CHUNK_ELEMENTS,
) -> Selection:
    """The pairs with z > edges[0] and their z, `chunk_elements` pre-activations at a time.

    `edges` holds, lowest first, the values that z is compared with, here and later.
    """
    d_sae = W_enc.shape[1]
    by_latent = W_enc.t()
    # What summing in another order can change, at most (Higham 2002, section 3.1).
    rounding = centred.shape[1] * torch.finfo(centred.dtype).eps
    a_norm = rounding * torch.linalg.vector_norm(centred, dim=1)
    w_norm = torch.linalg.vector_norm(by_latent, dim=1)
    lowest = edges[0] - a_norm.max() * w_norm

    chunk = max(1, chunk_elements // d_sae)
    buffer = centred.new_empty(min(chunk, len(centred)), d_sae)
    rows, cols, values = [], [], []
    for start in range(0, len(centred), chunk):
        piece = centred[start : start + chunk]
        z = torch.addmm(b_enc, piece, W_enc, out=buffer[: len(piece)])
        row, col = (z > lowest).nonzero().unbind(1)
        rows.append(row + start)
        cols.append(col)
        values.append(z[row, col])
    found = Pattern(torch.cat(rows), torch.cat(cols), len(centred), d_sae)
    z = torch.cat(values)

    doubt = a_norm[found.rows] * w_norm[found.cols]
    nearest = (z - edges[:, found.cols]).abs().amin(0)
    doubtful = nearest <= doubt
    disputed = found.where(doubtful)
    z[doubtful] = disputed.sampled_product(centred, by_latent) + b_enc[disputed.cols]
    return _above(found, z, edges[0])


@torch.no_grad()
def select_by_screening(
    centred: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    edges: Float[Tensor, "edges d_sae"],
    chunk_elements: int = DEFAULT_CHUNK_ELEMENTS,
) -> Selection:
    """As `select_directly`, looking first in bfloat16. Takes float32 input."""
    d_sae = W_enc.shape[1]
    by_latent = W_enc.t()
    upper_a, upper_w = _with_error_columns(centred, by_latent)
    # z = a·w + b > edge needs a·w > edge - b; rounding both sides to bfloat16 keeps their order.
    slack = 4 * _FLOAT32_ROUNDING * (edges[0].abs() + b_enc.abs())
    lowest = (edges[0] - b_enc - slack).bfloat16()

    chunk = max(1, 2 * chunk_elements // d_sae)
    buffer = upper_a.new_empty(min(chunk, len(centred)), d_sae)
    rows, cols = [], []
    for start in range(0, len(centred), chunk):
        piece = upper_a[start : start + chunk]
        upper = torch.mm(piece, upper_w.t(), out=buffer[: len(piece)])
        row, col = (upper >= lowest).nonzero().unbind(1)
        rows.append(row + start)
        cols.append(col)
    candidates = Pattern(torch.cat(rows), torch.cat(cols), len(centred), d_sae)
    z = candidates.sampled_product(centred, by_latent) + b_enc[candidates.cols]
    return _above(candidates, z, edges[0])


def _above(pattern: Pattern, z: Float[Tensor, " nnz"], edge: Float[Tensor, " d_sae"]) -> Selection:
    kept = z > edge[pattern.cols]
    return pattern.where(kept), z[kept]


def _with_error_columns(
    a: Float[Tensor, "batch d_in"], w: Float[Tensor, "d_sae d_in"]
) -> tuple[Float[Tensor, "batch k"], Float[Tensor, "d_sae k"]]:
    """bfloat16 matrices whose product is at least a @ w.T everywhere, rounding included."""
    low_a, a_norm, a_error = _rounded(a)
    low_w, w_norm, w_error = _rounded(w)
    # Summation in float32, in whatever order, of d_in products.
    summation = a.shape[1] * _FLOAT32_ROUNDING * (w_norm + w_error)
    low_a[:, -2], low_a[:, -1] = _up(a_error), _up(a_norm + a_error)
    low_w[:, -2], low_w[:, -1] = _up(w_norm + w_error), _up(w_error + summation)
    return low_a, low_w


def _rounded(
    matrix: Float[Tensor, "rows columns"], rows_at_once: int = 512
) -> tuple[Float[Tensor, "rows columns+2"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """In bfloat16 with two spare columns; the norm of each row, and of what rounding took."""
    rows, columns = matrix.shape
    low = matrix.new_zeros(rows, columns + 2, dtype=torch.bfloat16)
    norm, error = matrix.new_empty(rows), matrix.new_empty(rows)
    for start in range(0, rows, rows_at_once):
        piece = slice(start, start + rows_at_once)
        low[piece, :-2] = matrix[piece]
        norm[piece] = torch.linalg.vector_norm(matrix[piece], dim=1)
        error[piece] = torch.linalg.vector_norm(matrix[piece] - low[piece, :-2], dim=1)
    return low, norm, error


def _up(bound: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """A little above `bound`, so that rounding it to bfloat16 cannot bring it below."""
    return bound * (1 + 2 * _BFLOAT16_ROUNDING)
