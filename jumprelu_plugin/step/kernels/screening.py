"""Candidates by a half-precision product: which pairs could exceed the edge, as one bit a pair.

The bound is that of `select.py`: two extra columns make each element of the product an upper bound
of the pre-activation. The product is computed tile by tile in float32 sums, and only the outcome of
the comparison with the edge leaves a tile. At 4096 tokens and 16384 latents these are 8 MB, where
the product in bfloat16 is 134 MB and in float32 268 MB. A bit a pair needs no buffer that can
overflow, and its order is that of the pairs, so nothing has to be sorted.

Each row is scaled to a norm between 2^13 and 2^14 and rounded to float16. That has three more bits
than bfloat16 and runs at the same speed. The bound is then 8 times as tight, which matters where
θ is far out in the tail: at 131072 latents of 4096 inputs a bound in bfloat16 lets through twice
the pairs that exceed the edge. The scales are powers of two, so comparing with a scaled edge is
exact.
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
    matrix, center, b_enc, edge, low, scaled, columns, width, stride, of_sums,
    HAS_CENTER: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A scaled row in float16, its two extra columns, and its scale (tokens) or scaled edge."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(matrix + row * stride + at, mask=at < columns, other=0.0)
        if HAS_CENTER:
            value -= tl.load(center + at, mask=at < columns, other=0.0)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 0))
    # 2^(13 - e), where e is the exponent of the norm.
    exponent = (norm.to(tl.int32, bitcast=True) >> 23) & 0xFF
    field = tl.minimum(tl.maximum(127 + 127 + 13 - exponent, 1), 254)
    scale = (field << 23).to(tl.float32, bitcast=True)
    norm = norm * scale

    errors = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        value = tl.load(matrix + row * stride + at, mask=inside, other=0.0)
        if HAS_CENTER:
            value -= tl.load(center + at, mask=inside, other=0.0)
        value *= scale
        rounded = value.to(tl.float16)
        error = value - rounded.to(tl.float32)
        errors += error * error
        # The columns after the two extra ones hold zeros.
        stored = inside | ((at >= columns + 2) & (at < width))
        tl.store(low + row * width + at, rounded, mask=stored)
    # More by 2^-8 than rounding these sums, and then the bounds to float16, takes away.
    up = 1.00390625
    error = tl.sqrt(tl.sum(errors, 0))
    if TOKENS:
        first = error
        second = norm + error
        tl.store(scaled + row, scale)
    else:
        first = norm + error
        second = error + of_sums * (norm + error)
        # z = a·w + b > edge requires a·w > edge - b.
        b = tl.load(b_enc + row)
        e = tl.load(edge + row)
        margin = 2.384185791015625e-07 * (tl.abs(e) + tl.abs(b))  # 2^-22
        tl.store(scaled + row, (e - b - margin) * scale)
    tl.store(low + row * width + columns, (first * up).to(tl.float16))
    tl.store(low + row * width + columns + 1, (second * up).to(tl.float16))


def round_rows(
    matrix: Float[Tensor, "rows columns"],
    center: Float[Tensor, " columns"] | None = None,
    *,
    edges: tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]] | None = None,
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " rows"]]:
    """matrix - center, scaled and in float16, with the two extra columns of `select.py`.

    Args:
        matrix: tokens or, by latent, weights; its rows are contiguous.
        center: what is subtracted from each row; None stands for zero.
        edges: b_enc and the edge where the rows are weights; None where they are tokens.

    Returns:
        The rows; and for each token its scale, or for each latent what a·w must reach, scaled.
    """
    matrix = with_contiguous_rows(matrix)
    rows, columns = matrix.shape
    width = -(-(columns + 2) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    low = matrix.new_empty(rows, width, dtype=torch.float16)
    scaled = matrix.new_empty(rows)
    # float32 sums in any order: in the product that decides, and in this one, whose tensor cores
    # may cut where others round, which errs by twice as much. One more for the margin.
    of_sums = 4 * (columns + 8) * _FLOAT32_ROUNDING
    b_enc, edge = (scaled, scaled) if edges is None else edges
    block = min(1024, triton.next_power_of_2(width))
    _round_rows_kernel[(rows,)](
        matrix, matrix if center is None else center, b_enc, edge, low, scaled, columns, width,
        matrix.stride(0), of_sums, HAS_CENTER=center is not None, TOKENS=edges is None,
        BLOCK=block,
    )  # fmt: skip
    return low, scaled


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
    tokens, weights, token_scale, lowest, words, batch, d_sae, width, n_words,
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
        if UPCAST:  # NumPy, in which Triton's interpreter multiplies, would sum in float16
            a_tile, w_tile = a_tile.to(tl.float32), w_tile.to(tl.float32)
        upper = tl.dot(a_tile, w_tile, upper)
        a += DEPTH
        w += DEPTH
    edge = tl.load(lowest + latent, mask=latent < d_sae, other=float("inf"))
    scale = tl.load(token_scale + token, mask=token < batch, other=1.0)
    flags = (upper >= edge[None, :] * scale[:, None]) & (latent < d_sae)[None, :]
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
    low_x, scale_x = round_rows(x, center)
    low_w, lowest = round_rows(weight, edges=(b_enc, edge))
    n_words = -(-d_sae // WORD_BITS)
    words = x.new_empty(batch, n_words, dtype=torch.int32)

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(batch, sizes["TOKENS"]) * triton.cdiv(d_sae, sizes["LATENTS"]),)

    _screen_kernel[grid](
        low_x, low_w, scale_x, lowest, words, batch, d_sae, low_x.shape[1], n_words,
        UPCAST=interpreted(),
    )  # fmt: skip
    return words
