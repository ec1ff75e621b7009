"""Candidates by a bfloat16 product: which pairs could exceed the edge, as one bit a pair.

The bound is that of `select.py`: two extra columns make each element of the product an upper bound
of the pre-activation. The product is computed tile by tile in float32 sums, and only the outcome of
the comparison with the edge leaves a tile. At 4096 tokens and 16384 latents these are 8 MB, where
the product in bfloat16 is 134 MB and in float32 268 MB. A bit a pair needs no buffer that can
overflow, and its order is that of the pairs, so nothing has to be sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.step.kernels import interpreted
from jumprelu_plugin.step.kernels.products import with_contiguous_rows
from jumprelu_plugin.step.kernels.tuning import jit, tiles

WORD_BITS = 32
COLUMN_MULTIPLE = 64
_FLOAT32_ROUNDING = 2.0**-24


@jit
def _round_rows_kernel(
    matrix, center, low, columns, width, stride, of_sums, HAS_CENTER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row in bfloat16, and its two extra columns: its norm and the norm of its rounding error."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    errors = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        value = tl.load(matrix + row * stride + at, mask=inside, other=0.0)
        if HAS_CENTER:
            value -= tl.load(center + at, mask=inside, other=0.0)
        rounded = value.to(tl.bfloat16)
        error = value - rounded.to(tl.float32)
        squares += value * value
        errors += error * error
        # The columns after the two extra ones hold zeros.
        stored = inside | ((at >= columns + 2) & (at < width))
        tl.store(low + row * width + at, rounded, mask=stored)
    # More by 2^-6 than rounding these sums, and then the bounds to bfloat16, takes away.
    up = 1.015625
    norm = tl.sqrt(tl.sum(squares, 0))
    error = tl.sqrt(tl.sum(errors, 0))
    if TOKENS:
        first = error
        second = norm + error
    else:
        first = norm + error
        second = error + of_sums * (norm + error)
    tl.store(low + row * width + columns, (first * up).to(tl.bfloat16))
    tl.store(low + row * width + columns + 1, (second * up).to(tl.bfloat16))


def round_rows(
    matrix: Float[Tensor, "rows columns"],
    center: Float[Tensor, " columns"] | None,
    *,
    tokens: bool,
) -> Float[Tensor, "rows k"]:
    """matrix - center in bfloat16, with the two extra columns of `select.py`, in one pass.

    Args:
        matrix: tokens or, by latent, weights; its rows are contiguous.
        center: what is subtracted from each row; None stands for zero.
        tokens: whether the rows are tokens; else they are weights.
    """
    matrix = with_contiguous_rows(matrix)
    rows, columns = matrix.shape
    width = -(-(columns + 2) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    low = matrix.new_empty(rows, width, dtype=torch.bfloat16)
    # float32 sums in any order: in the product that decides, and in this one, whose tensor cores
    # may cut where others round, which errs by twice as much. One more for the margin.
    of_sums = 4 * (columns + 8) * _FLOAT32_ROUNDING
    block = min(1024, triton.next_power_of_2(width))
    _round_rows_kernel[(rows,)](
        matrix, matrix if center is None else center, low, columns, width, matrix.stride(0),
        of_sums, HAS_CENTER=center is not None, TOKENS=tokens, BLOCK=block,
    )  # fmt: skip
    return low


@tiles(
    ("batch", "d_sae", "width"),
    {"TOKENS": 32, "LATENTS": 64, "DEPTH": 64},
    ({"TOKENS": 128, "LATENTS": 256, "DEPTH": 64}, 8, 3),
    ({"TOKENS": 256, "LATENTS": 128, "DEPTH": 64}, 8, 3),
    ({"TOKENS": 128, "LATENTS": 128, "DEPTH": 64}, 8, 4),
    ({"TOKENS": 128, "LATENTS": 128, "DEPTH": 64}, 4, 4),
    ({"TOKENS": 64, "LATENTS": 128, "DEPTH": 64}, 4, 4),
)
@jit
def _screen_kernel(
    tokens, weights, lowest, words, batch, d_sae, width, n_words,
    UPCAST: tl.constexpr, TOKENS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The bits of one tile: tokens @ weights.T >= lowest."""
    # Tiles in groups of eight rows, so that tiles that run together share rows and columns in L2.
    n_rows = tl.cdiv(batch, TOKENS)
    n_columns = tl.cdiv(d_sae, LATENTS)
    tile = tl.program_id(0)
    group = tile // (8 * n_columns)
    first = group * 8
    rows_here = tl.minimum(n_rows - first, 8)
    row_tile = first + (tile % (8 * n_columns)) % rows_here
    column_tile = (tile % (8 * n_columns)) // rows_here

    token = row_tile * TOKENS + tl.arange(0, TOKENS)
    latent = column_tile * LATENTS + tl.arange(0, LATENTS)
    depth = tl.arange(0, DEPTH)
    # Past the end the last row is read again; its bits are not stored.
    a = tokens + tl.minimum(token, batch - 1).to(tl.int64)[:, None] * width + depth[None, :]
    w = weights + tl.minimum(latent, d_sae - 1).to(tl.int64)[None, :] * width + depth[:, None]
    upper = tl.zeros([TOKENS, LATENTS], tl.float32)
    for _ in range(0, width, DEPTH):
        a_tile, w_tile = tl.load(a), tl.load(w)
        if UPCAST:  # Triton's interpreter multiplies the bits of bfloat16 numbers as integers
            a_tile, w_tile = a_tile.to(tl.float32), w_tile.to(tl.float32)
        upper = tl.dot(a_tile, w_tile, upper)
        a += DEPTH
        w += DEPTH
    edge = tl.load(lowest + latent, mask=latent < d_sae, other=float("inf"))
    flags = (upper >= edge[None, :]) & (latent < d_sae)[None, :]
    bits = tl.reshape(flags.to(tl.int32), (TOKENS, LATENTS // 32, 32))
    packed = tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)
    word = column_tile * (LATENTS // 32) + tl.arange(0, LATENTS // 32)
    at = words + token.to(tl.int64)[:, None] * n_words + word[None, :]
    tl.store(at, packed, mask=(token < batch)[:, None] & (word < n_words)[None, :])


def screen(
    x: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
    center: Float[Tensor, " d_in"] | None,
) -> Int[Tensor, "batch words"]:
    """Bit i mod 32 of word i div 32 of a token: whether its z_i could exceed the edge.

    The arguments are those of `select.select`; both matrices are float32 with contiguous rows.
    """
    batch, d_sae = len(x), len(weight)
    low_x = round_rows(x, center, tokens=True)
    low_w = round_rows(weight, None, tokens=False)
    # z = a·w + b > edge requires a·w > edge - b.
    margin = 4 * _FLOAT32_ROUNDING * (edge.abs() + b_enc.abs())
    n_words = -(-d_sae // WORD_BITS)
    words = x.new_empty(batch, n_words, dtype=torch.int32)

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(batch, sizes["TOKENS"]) * triton.cdiv(d_sae, sizes["LATENTS"]),)

    _screen_kernel[grid](
        low_x, low_w, edge - b_enc - margin, words, batch, d_sae, low_x.shape[1], n_words,
        UPCAST=interpreted(),
    )  # fmt: skip
    return words
