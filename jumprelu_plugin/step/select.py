"""Find the pairs (token, latent) whose pre-activation lies above an edge, and their values.

Two steps. A product of all pairs, computed fast, together with a bound on what its rounding can
have done, leaves *candidates*: every pair that could lie above the edge. The candidates alone are
computed again by one routine, `Pattern.sampled_product`, whose answer at a pair depends on nothing
but the pair. That value decides. So the pairs, and the last bit of their values, are the same
whatever the fast product was computed by, in or with:

`full precision`  the dtype of the input, by the fastest library (`product.py`), in fewer bits
                  where the user allows that (TF32).
`screening`       bfloat16, where matrix units are several times faster. With a, w the float
                  vectors and a', w' their roundings,

                      |a·w - a'·w'|  ≤  ‖a - a'‖ ‖w'‖ + ‖a‖ ‖w - w'‖

                  (Cauchy-Schwarz), plus the rounding of the products' float32 sum. The bound is
                  itself an inner product, so the same matrix product computes it, in two extra
                  columns: what comes out is an upper bound of every pre-activation.
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
# Some latents, and where to put which of their pairs with a tile's tokens are candidates.
Mark = Callable[[slice, Bool[Tensor, "rows latents"]], None]
# Gives the `Mark` of a tile's tokens.
Look = Callable[[Float[Tensor, "rows d_in"]], Mark]

# Bytes of one tile of the product. On a CPU, 4 MB: the product is as fast as with 16, within the
# noise (Zen 5, one thread), and what one tile leaves is recycled by the next. On a GPU, each row
# of tiles ends in one wait for the device, so there are few.
_TILE_BYTES = {"cpu": 2**22}
_TILE_BYTES_ELSEWHERE = 2**28
# A product of fewer rows than this reads the weights more than it computes.
_TILE_ROWS = 256

# Rounding to bfloat16 moves a value by at most this share of it (8 significant bits).
_BFLOAT16_ROUNDING = 2.0**-8
_FLOAT32_ROUNDING = 2.0**-24
# Columns of the bfloat16 matrices come in multiples of this, as matrix units like them.
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
        center: None is zero. Taken from x a tile at a time: a second x is never made.
        screen: look for candidates in bfloat16. Ignored unless the input is float32.
        tile_bytes: how much of the product exists at one time.
    """
    weight = W_enc.t().contiguous()  # as it is, where the encoder is stored by latent
    if tile_bytes is None:
        tile_bytes = _TILE_BYTES.get(x.device.type, _TILE_BYTES_ELSEWHERE)
    candidates = _candidates(x, weight, b_enc, edge, center, screen, tile_bytes)
    z = candidates.sampled_product(x, weight, center).add_(b_enc[candidates.cols])
    kept, places = candidates.where(z > edge[candidates.cols])
    return kept, z[places]


def _candidates(
    x: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
    center: Float[Tensor, " d_in"] | None,
    screen: bool,
    tile_bytes: int,
) -> Pattern:
    """The pairs that could lie above the edge. What it takes to find them is gone afterwards."""
    screen = screen and x.dtype == torch.float32
    look = (_by_screening if screen else _directly)(weight, b_enc, edge)
    itemsize = 2 if screen else x.element_size()
    return _marked(look, x, center, len(weight), tile_bytes // itemsize)


def _marked(
    look: Look,
    x: Float[Tensor, "batch d_in"],
    center: Float[Tensor, " d_in"] | None,
    d_sae: int,
    tile_elements: int,
) -> Pattern:
    """The pairs that are marked, tile by tile."""
    batch = len(x)
    rows_at_once = max(1, min(batch, max(_TILE_ROWS, tile_elements // d_sae), tile_elements))
    latents_at_once = max(1, min(d_sae, tile_elements // rows_at_once))
    # One byte a pair, in whole words of eight for `_places`.
    flags = x.new_zeros(-(-rows_at_once * d_sae // 8) * 8, dtype=torch.bool)
    found = [flags.new_zeros(0, dtype=torch.int64)]
    for start in range(0, batch, rows_at_once):
        tokens = subtract(x[start : start + rows_at_once], center)
        mark = look(tokens)
        used = len(tokens) * d_sae
        flags[used:] = False
        marked = flags[:used].view(-1, d_sae)
        for first in range(0, d_sae, latents_at_once):
            latents = slice(first, min(first + latents_at_once, d_sae))
            mark(latents, marked[:, latents])
        found.append(_places(flags) + start * d_sae)
    flat = torch.cat(found)
    pairs = flat.new_empty(2, len(flat))
    torch.div(flat, d_sae, rounding_mode="floor", out=pairs[0])
    torch.sub(flat, pairs[0], alpha=d_sae, out=pairs[1])
    return Pattern(pairs, batch, d_sae)


def _places(flags: Bool[Tensor, " flags"]) -> Int[Tensor, " true"]:
    """Where the flags are True, ascending."""
    if flags.device.type != "cpu":
        return flags.nonzero().squeeze(1)
    # Few are: look at eight at a time first. 1 ms instead of 5 for 8 million flags on a Zen 5.
    words = flags.view(torch.int64).nonzero().squeeze(1)
    word, bit = flags.view(-1, 8)[words].nonzero().unbind(1)
    return words[word] * 8 + bit


def _directly(
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> Look:
    # Twice: this product and the one that decides may err in opposite directions.
    rounding = 2 * product.rounding(weight)
    w_doubt = rounding * torch.linalg.vector_norm(weight, dim=1)
    b_edge = edge - rounding * (b_enc.abs() + edge.abs())

    def look(tokens: Tensor) -> Mark:
        # One edge for most tokens. The few with the largest norms, such as attention sinks, get
        # their own: their doubt would make candidates of every other token's pairs.
        norms = torch.linalg.vector_norm(tokens, dim=1)
        loud = norms.topk(1 + len(norms) // 64).indices
        quiet_norm = norms.index_fill(0, loud, 0.0).max()

        def mark(latents: slice, marked: Tensor) -> None:
            z = product.linear(tokens, weight[latents], b_enc[latents])
            doubt, lowest = w_doubt[latents], b_edge[latents]
            torch.gt(z, lowest - quiet_norm * doubt, out=marked)
            marked[loud] = z[loud] > lowest - norms[loud, None] * doubt

        return mark

    return look


def _by_screening(
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> Look:
    upper_w = _weights_and_error(weight)
    # z = a·w + b > edge needs a·w > edge - b; rounding both sides to bfloat16 keeps their order.
    slack = 4 * _FLOAT32_ROUNDING * (edge.abs() + b_enc.abs())
    lowest = (edge - b_enc - slack).bfloat16()

    def look(tokens: Tensor) -> Mark:
        upper_a = _tokens_and_error(tokens)

        def mark(latents: slice, marked: Tensor) -> None:
            with _sums_in_float32(tokens.device):
                upper = upper_a @ upper_w[latents].t()
            torch.ge(upper, lowest[latents], out=marked)

        return mark

    return look


def _tokens_and_error(a: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows k"]:
    """a in bfloat16, with two columns more that meet those of `_weights_and_error`.

    The product of the two is at least a @ w.T everywhere, rounding included.
    """
    d_in = a.shape[1]
    low, norm, error = _rounded(a)
    low[:, d_in], low[:, d_in + 1] = _up(error), _up(norm + error)
    return low


def _weights_and_error(w: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae k"]:
    d_in = w.shape[1]
    low, norm, error = _rounded(w)
    # Summation in float32, in whatever order, here and in the product that decides.
    summation = 2 * (d_in + 8) * _FLOAT32_ROUNDING * (norm + error)
    low[:, d_in], low[:, d_in + 1] = _up(norm + error), _up(error + summation)
    return low


def _rounded(
    matrix: Float[Tensor, "rows columns"], elements_at_once: int = 2**17
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """In bfloat16 with spare columns; the norm of each row, and of what rounding took."""
    rows, columns = matrix.shape
    width = -(-(columns + 2) // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
    low = matrix.new_empty(rows, width, dtype=torch.bfloat16)
    low[:, columns:] = 0
    norm, error = matrix.new_empty(rows), matrix.new_empty(rows)
    # On a CPU, so few rows at a time that they are read from memory once.
    at_once = max(1, elements_at_once // columns) if matrix.device.type == "cpu" else rows
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        low[piece, :columns] = matrix[piece]
        torch.linalg.vector_norm(matrix[piece], dim=1, out=norm[piece])
        lost = matrix[piece] - low[piece, :columns]
        torch.linalg.vector_norm(lost, dim=1, out=error[piece])
    return low, norm, error


def _up(bound: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """A little above `bound`, so that rounding it to bfloat16 cannot bring it below."""
    return bound * (1 + 2 * _BFLOAT16_ROUNDING)


@contextmanager
def _sums_in_float32(device: torch.device) -> Iterator[None]:
    """Keep a GPU from adding parts of a bfloat16 product's sums in bfloat16."""
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
