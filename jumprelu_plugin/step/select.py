"""Finds the pairs (token, latent) whose pre-activation exceeds an edge, and computes their values.

There are two steps. First, a fast product of all pairs and a bound on its rounding error give the
*candidates*: every pair that could exceed the edge. Then one routine, `Pattern.sampled_product`,
computes the candidates again. Its result at a pair depends only on that pair, and it decides. So
the selected pairs, and the last bit of their values, do not depend on the device, library or
precision of the fast product, which is computed in one of two ways:

`full precision`  in the input's dtype, by the fastest library (`product.py`), or in fewer bits
                  where the user allows that (TF32).
`screening`       in bfloat16, where matrix units are several times faster. If a and w are the float
                  vectors and a' and w' their roundings,

                      |a·w - a'·w'|  ≤  ‖a - a'‖ ‖w'‖ + ‖a‖ ‖w - w'‖

                  (Cauchy-Schwarz), plus the rounding of the product's float32 sum. The bound is
                  itself an inner product, so two extra columns of the same matrix product add it:
                  the result is an upper bound of every pre-activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.step import product
from jumprelu_plugin.step.pattern import Pattern, subtract

Selection = tuple[Pattern, Float[Tensor, " nnz"]]
# Takes a slice of the latents and flags which of their pairs with a tile's tokens are candidates.
FlagCandidates = Callable[[slice, Bool[Tensor, "rows latents"]], None]
# Takes a tile's tokens.
TileTest = Callable[[Float[Tensor, "rows d_in"]], FlagCandidates]

# Bytes of one tile of the product. On a CPU, a product in tiles of 4 MB is as fast as in tiles of
# 16 MB, within the noise (Zen 5, one thread), and each tile reuses the memory of the one before. On
# a GPU the host waits for the device once after each row of tiles, so there are few of them.
_TILE_BYTES = {"cpu": 2**22}
_TILE_BYTES_ELSEWHERE = 2**28
# With fewer rows than this, reading the weights takes longer than the product.
_TILE_ROWS = 256

# Rounding to bfloat16 (8 significant bits) changes a value by at most this fraction of it.
_BFLOAT16_ROUNDING = 2.0**-8
_FLOAT32_ROUNDING = 2.0**-24
# Matrix units prefer bfloat16 matrices whose number of columns is a multiple of this.
_COLUMN_MULTIPLE = 32


@torch.no_grad()
def select(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
    *,
    center: Float[Tensor, " d_in"] | None = None,
    screen: bool = False,
    tile_bytes: int | None = None,
) -> Selection:
    """The pairs with z = (x - center) @ W_enc + b_enc > edge, and their z.

    Args:
        x: the encoder's input.
        W_enc: encoder weights; no copy is made if they are stored by latent.
        b_enc: encoder biases.
        edge: the value that z must exceed, for each latent.
        center: None stands for zero. It is subtracted tile by tile, without a second copy of x.
        screen: find candidates in bfloat16. Ignored unless the input is float32.
        tile_bytes: size of the part of the product that exists at one time.

    Returns:
        The selected pairs, sorted by token and then by latent, and z at each of them.
    """
    weight = W_enc.t().contiguous()
    if tile_bytes is None:
        tile_bytes = _TILE_BYTES.get(x.device.type, _TILE_BYTES_ELSEWHERE)
    candidates = find_candidates(x, weight, b_enc, edge, center, screen, tile_bytes)
    z = candidates.sampled_product(x, weight, center).add_(b_enc[candidates.cols])
    selected, places = candidates.where(z > edge[candidates.cols])
    return selected, z[places]


def find_candidates(
    x: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
    center: Float[Tensor, " d_in"] | None,
    screen: bool,
    tile_bytes: int,
) -> Pattern:
    """The pairs that could exceed the edge; the arguments are those of `select`."""
    screen = screen and x.dtype == torch.float32
    test = (_screened_test if screen else _full_precision_test)(weight, b_enc, edge)
    itemsize = 2 if screen else x.element_size()
    return _flagged_pairs(test, x, center, len(weight), tile_bytes // itemsize)


def _flagged_pairs(
    test: TileTest,
    x: Float[Tensor, "batch d_in"],
    center: Float[Tensor, " d_in"] | None,
    d_sae: int,
    tile_elements: int,
) -> Pattern:
    """The pairs that the test flags, found tile by tile."""
    batch = len(x)
    tile_rows = max(1, min(batch, max(_TILE_ROWS, tile_elements // d_sae), tile_elements))
    tile_latents = max(1, min(d_sae, tile_elements // tile_rows))
    # One byte a pair, padded to whole words of eight for `_true_places`.
    flags = x.new_zeros(-(-tile_rows * d_sae // 8) * 8, dtype=torch.bool)
    places = [flags.new_zeros(0, dtype=torch.int64)]
    for start in range(0, batch, tile_rows):
        tokens = subtract(x[start : start + tile_rows], center)
        flag_candidates = test(tokens)
        used = len(tokens) * d_sae
        flags[used:] = False
        matrix = flags[:used].view(-1, d_sae)
        for first in range(0, d_sae, tile_latents):
            latents = slice(first, min(first + tile_latents, d_sae))
            flag_candidates(latents, matrix[:, latents])
        places.append(_true_places(flags) + start * d_sae)
    flat = torch.cat(places)
    pairs = flat.new_empty(2, len(flat))
    torch.div(flat, d_sae, rounding_mode="floor", out=pairs[0])
    torch.sub(flat, pairs[0], alpha=d_sae, out=pairs[1])
    return Pattern(pairs, batch, d_sae)


def _true_places(flags: Bool[Tensor, " flags"]) -> Int[Tensor, " true"]:
    """The indices of the flags that are True, ascending."""
    if flags.device.type != "cpu":
        return flags.nonzero().squeeze(1)
    # Few flags are True, so find nonzero groups of eight first: 1 ms instead of 5 for 8 million
    # flags (Zen 5).
    words = flags.view(torch.int64).nonzero().squeeze(1)
    word, bit = flags.view(-1, 8)[words].nonzero().unbind(1)
    return words[word] * 8 + bit


def _full_precision_test(
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> TileTest:
    # Twice the bound: this product and the one that decides may err in opposite directions.
    rounding = 2 * product.rounding(weight)
    margin_per_norm = rounding * torch.linalg.vector_norm(weight, dim=1)
    lowest_edge = edge - rounding * (b_enc.abs() + edge.abs())

    def test(tokens: Tensor) -> FlagCandidates:
        # The margin grows with a token's norm. Inliers share the margin of the largest norm among
        # them. The few tokens with the largest norms, such as attention sinks, have their own:
        # with a shared margin, many pairs of every other token would become candidates.
        norms = torch.linalg.vector_norm(tokens, dim=1)
        outliers = norms.topk(1 + len(norms) // 64).indices
        inlier_norm = norms.index_fill(0, outliers, 0.0).max()

        def flag_candidates(latents: slice, flags: Tensor) -> None:
            z = product.linear(tokens, weight[latents], b_enc[latents])
            margin, lowest = margin_per_norm[latents], lowest_edge[latents]
            torch.gt(z, lowest - inlier_norm * margin, out=flags)
            flags[outliers] = z[outliers] > lowest - norms[outliers, None] * margin

        return flag_candidates

    return test


def _screened_test(
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> TileTest:
    upper_w = _weights_and_error(weight)
    # z = a·w + b > edge requires a·w > edge - b. Rounding both sides to bfloat16 keeps their order.
    margin = 4 * _FLOAT32_ROUNDING * (edge.abs() + b_enc.abs())
    lowest = (edge - b_enc - margin).bfloat16()

    def test(tokens: Tensor) -> FlagCandidates:
        upper_a = _tokens_and_error(tokens)

        def flag_candidates(latents: slice, flags: Tensor) -> None:
            with _sums_in_float32(tokens.device):
                upper = upper_a @ upper_w[latents].t()
            torch.ge(upper, lowest[latents], out=flags)

        return flag_candidates

    return test


def _tokens_and_error(a: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows k"]:
    """a in bfloat16, with two extra columns that multiply those of `_weights_and_error`.

    Every element of the product of the two matrices is at least that of a @ w.T, despite rounding.
    """
    d_in = a.shape[1]
    low, norm, error = _rounded(a)
    low[:, d_in], low[:, d_in + 1] = _up(error), _up(norm + error)
    return low


def _weights_and_error(w: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae k"]:
    d_in = w.shape[1]
    low, norm, error = _rounded(w)
    # Rounding of float32 sums in any order, in this product and in the one that decides.
    summation = 2 * (d_in + 8) * _FLOAT32_ROUNDING * (norm + error)
    low[:, d_in], low[:, d_in + 1] = _up(norm + error), _up(error + summation)
    return low


def _rounded(
    matrix: Float[Tensor, "rows columns"], elements_at_once: int = 2**17
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The matrix in bfloat16 with padding columns, its rows' norms, and the norms of the errors."""
    rows, columns = matrix.shape
    width = -(-(columns + 2) // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
    low = matrix.new_empty(rows, width, dtype=torch.bfloat16)
    low[:, columns:] = 0
    norm, error = matrix.new_empty(rows), matrix.new_empty(rows)
    # On a CPU, few enough rows at a time that they stay in cache and are read from memory once.
    at_once = max(1, elements_at_once // columns) if matrix.device.type == "cpu" else rows
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        low[piece, :columns] = matrix[piece]
        torch.linalg.vector_norm(matrix[piece], dim=1, out=norm[piece])
        difference = matrix[piece] - low[piece, :columns]
        torch.linalg.vector_norm(difference, dim=1, out=error[piece])
    return low, norm, error


def _up(bound: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Slightly more than `bound`, so that its rounding to bfloat16 is not below `bound`."""
    return bound * (1 + 2 * _BFLOAT16_ROUNDING)


@contextmanager
def _sums_in_float32(device: torch.device) -> Iterator[None]:
    """Prevent a GPU from accumulating parts of a bfloat16 product in bfloat16."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    allowed = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = allowed
