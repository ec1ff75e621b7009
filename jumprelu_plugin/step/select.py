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
from jumprelu_plugin.step.pattern import Pattern

Selection = tuple[Pattern, Float[Tensor, " nnz"]]
# (rows, latents) of a tile, and where to put which of its pairs are candidates.
Mark = Callable[[slice, slice, Bool[Tensor, "rows latents"]], None]

# Bytes of one tile of the product. On a CPU, 16 MB: large enough that the product runs at full
# speed, small enough that memory is recycled between tiles (at 32 MB the allocator gives it back
# to the system, and the page faults cost 8 % of the product on a Zen 5). On a GPU, each row of
# tiles ends in one wait for the device, so there are few.
_TILE_BYTES = {"cpu": 2**24}
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
    centred: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
    *,
    screen: bool = False,
    tile_bytes: int | None = None,
) -> Selection:
    """The pairs with z = centred @ W_enc + b_enc > edge, and their z.

    Args:
        screen: look for candidates in bfloat16. Ignored unless the input is float32.
        tile_bytes: how much of the product exists at one time.
    """
    weight = W_enc.t().contiguous()  # as it is, where the encoder is stored by latent
    screen = screen and centred.dtype == torch.float32
    mark = (_mark_by_screening if screen else _mark_directly)(centred, weight, b_enc, edge)
    if tile_bytes is None:
        tile_bytes = _TILE_BYTES.get(centred.device.type, _TILE_BYTES_ELSEWHERE)
    itemsize = 2 if screen else centred.element_size()
    candidates = _marked(mark, centred, len(weight), tile_bytes // itemsize)
    z = candidates.sampled_product(centred, weight) + b_enc[candidates.cols]
    kept, places = candidates.where(z > edge[candidates.cols])
    return kept, z[places]


def _marked(
    mark: Mark, centred: Float[Tensor, "batch d_in"], d_sae: int, tile_elements: int
) -> Pattern:
    """The pairs that `mark` marks, tile by tile."""
    batch = len(centred)
    rows_at_once = max(1, min(batch, max(_TILE_ROWS, tile_elements // d_sae), tile_elements))
    latents_at_once = max(1, min(d_sae, tile_elements // rows_at_once))
    # One byte a pair, in whole words of eight for `_places`.
    flags = centred.new_zeros(-(-rows_at_once * d_sae // 8) * 8, dtype=torch.bool)
    found = [flags.new_zeros(0, dtype=torch.int64)]
    for start in range(0, batch, rows_at_once):
        rows = slice(start, min(start + rows_at_once, batch))
        used = (rows.stop - rows.start) * d_sae
        flags[used:] = False
        marked = flags[:used].view(-1, d_sae)
        for first in range(0, d_sae, latents_at_once):
            latents = slice(first, min(first + latents_at_once, d_sae))
            mark(rows, latents, marked[:, latents])
        found.append(_places(flags) + start * d_sae)
    flat = torch.cat(found)
    pairs = flat.div(d_sae, rounding_mode="floor")
    return Pattern(pairs, flat - pairs * d_sae, batch, d_sae)


def _places(flags: Bool[Tensor, " flags"]) -> Int[Tensor, " true"]:
    """Where the flags are True, ascending."""
    if flags.device.type != "cpu":
        return flags.nonzero().squeeze(1)
    # Few are: look at eight at a time first. 1 ms instead of 5 for 8 million flags on a Zen 5.
    words = flags.view(torch.int64).nonzero().squeeze(1)
    word, bit = flags.view(-1, 8)[words].nonzero().unbind(1)
    return words[word] * 8 + bit


def _mark_directly(
    centred: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> Mark:
    # Twice: this product and the one that decides may err in opposite directions.
    rounding = 2 * product.rounding(centred)
    a_norm = torch.linalg.vector_norm(centred, dim=1)
    w_doubt = rounding * torch.linalg.vector_norm(weight, dim=1)
    b_edge = edge - rounding * (b_enc.abs() + edge.abs())
    buffer = centred.new_empty(0)

    def mark(rows: slice, latents: slice, marked: Tensor) -> None:
        nonlocal buffer
        if buffer.numel() < marked.numel():
            buffer = centred.new_empty(marked.numel())
        out = buffer[: marked.numel()].view(marked.shape)
        z = product.linear(centred[rows], weight[latents], b_enc[latents], out)
        norms, doubt, lowest = a_norm[rows], w_doubt[latents], b_edge[latents]
        # One edge for most tokens. The few with the largest norms, such as attention sinks, get
        # their own: their doubt would make candidates of every other token's pairs.
        loud = norms.topk(1 + len(norms) // 64).indices
        quiet_norm = norms.index_fill(0, loud, 0.0).max()
        torch.gt(z, lowest - quiet_norm * doubt, out=marked)
        marked[loud] = z[loud] > lowest - norms[loud, None] * doubt

    return mark


def _mark_by_screening(
    centred: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> Mark:
    upper_a, upper_w = _with_error_columns(centred, weight)
    # z = a·w + b > edge needs a·w > edge - b; rounding both sides to bfloat16 keeps their order.
    slack = 4 * _FLOAT32_ROUNDING * (edge.abs() + b_enc.abs())
    lowest = (edge - b_enc - slack).bfloat16()
    buffer = upper_a.new_empty(0)

    def mark(rows: slice, latents: slice, marked: Tensor) -> None:
        nonlocal buffer
        if buffer.numel() < marked.numel():
            buffer = upper_a.new_empty(marked.numel())
        out = buffer[: marked.numel()].view(marked.shape)
        with _sums_in_float32(out.device):
            upper = torch.mm(upper_a[rows], upper_w[latents].t(), out=out)
        torch.ge(upper, lowest[latents], out=marked)

    return mark


def _with_error_columns(
    a: Float[Tensor, "batch d_in"], w: Float[Tensor, "d_sae d_in"]
) -> tuple[Float[Tensor, "batch k"], Float[Tensor, "d_sae k"]]:
    """bfloat16 matrices whose product is at least a @ w.T everywhere, rounding included."""
    d_in = a.shape[1]
    low_a, a_norm, a_error = _rounded(a)
    low_w, w_norm, w_error = _rounded(w)
    # Summation in float32, in whatever order, here and in the product that decides.
    summation = 2 * (d_in + 8) * _FLOAT32_ROUNDING * (w_norm + w_error)
    low_a[:, d_in], low_a[:, d_in + 1] = _up(a_error), _up(a_norm + a_error)
    low_w[:, d_in], low_w[:, d_in + 1] = _up(w_norm + w_error), _up(w_error + summation)
    return low_a, low_w


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
