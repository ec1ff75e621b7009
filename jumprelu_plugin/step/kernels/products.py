"""Inner products at pairs, and weighted sums of rows by token or by latent.

Both read rows of a matrix in the order of the pairs and are bound by memory. The blocks that run
together share a slab of columns, narrow enough to stay in the GPU's L2 cache while all pairs
pass over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.step.kernels.tuning import jit, tiles

# A sum of more rows than this is divided among several blocks. A latent that fires on every token
# of a batch would otherwise be one block's work long after the others are done.
LONGEST_PIECE = 256


@tiles(
    ("columns", "HAS_CENTER"),
    {"ENTRIES": 64, "COLUMNS": 32},
    ({"ENTRIES": 8, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 256}, 8, 2),
    ({"ENTRIES": 32, "COLUMNS": 128}, 8, 2),
)
@jit
def _sampled_kernel(
    order, rows, cols, count, left, right, center, out, capacity, columns,
    left_stride, right_stride, HAS_CENTER: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(left - center)[row] · right[col] for a block of entries, taken in `order`."""
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    used = at < tl.load(count)
    entry = tl.load(order + at, mask=at < capacity, other=0)
    row = tl.load(rows + entry, mask=used, other=0).to(tl.int64)
    col = tl.load(cols + entry, mask=used, other=0).to(tl.int64)
    products = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = used[:, None] & (column < columns)[None, :]
        a = tl.load(left + row[:, None] * left_stride + column[None, :], mask=inside, other=0.0)
        if HAS_CENTER:
            a -= tl.load(center + column, mask=column < columns, other=0.0)[None, :]
        w = tl.load(right + col[:, None] * right_stride + column[None, :], mask=inside, other=0.0)
        products += a * w
    tl.store(out + entry, tl.sum(products, 1), mask=at < capacity)


def sampled_product(
    order: Int[Tensor, " capacity"],
    rows: Int[Tensor, " capacity"],
    cols: Int[Tensor, " capacity"],
    count: Int[Tensor, ""],
    left: Float[Tensor, "n k"],
    right: Float[Tensor, "m k"],
    center: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, " capacity"]:
    """(left - center)[rows] · right[cols], entry by entry, in float32; 0 at unused entries.

    The value at a pair depends on its two vectors alone: every entry sums in the same order.

    Args:
        order: a permutation of the entries. In the order by latent, entries that run together
            share a row of `right`.
        count: how many of the entries, in that order, are used.
    """
    left, right = with_contiguous_rows(left), with_contiguous_rows(right)
    out = left.new_empty(len(order))
    capacity, columns = len(order), left.shape[1]

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(capacity, sizes["ENTRIES"]),)

    _sampled_kernel[grid](
        order, rows, cols, count, left, right, left if center is None else center, out,
        capacity, columns, left.stride(0), right.stride(0),
        HAS_CENTER=center is not None,
    )  # fmt: skip
    return out


@tiles(
    ("columns", "SHARED"),
    {"ENTRIES": 64, "COLUMNS": 32},
    ({"ENTRIES": 8, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 256}, 8, 2),
    ({"ENTRIES": 4, "COLUMNS": 256}, 4, 2),
    zeroed=("out",),
)
@jit
def _sums_kernel(
    index, ends, weights, matrix, center, out, sum_of_piece, piece_ends, sums, columns,
    stride, longest, HAS_CENTER: tl.constexpr, SHARED: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One sum, or one piece of one, over a slab of columns."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.load(sum_of_piece + piece) if SHARED else piece.to(tl.int64)
    exists = which < sums
    which = tl.minimum(which, sums - 1)
    first = tl.load(ends + which)
    last = tl.load(ends + which + 1)
    if SHARED:
        pieces = tl.maximum((last - first + longest - 1) // longest, 1)
        first += (piece - (tl.load(piece_ends + which) - pieces)) * longest
        last = tl.minimum(last, first + longest)
    last = tl.where(exists, last, first)
    if HAS_CENTER:
        shift = tl.load(center + column, mask=column < columns, other=0.0)
    products = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        weight = tl.load(weights + entry, mask=entry < last, other=0.0)
        # Rows with weight 0, such as those of latents in the window below θ, are not read.
        used = weight != 0.0
        row = tl.load(index + entry, mask=used, other=0).to(tl.int64)
        inside = used[:, None] & (column < columns)[None, :]
        values = tl.load(matrix + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        if HAS_CENTER:
            values -= shift[None, :]
        products += weight[:, None] * values
    total = tl.sum(products, 0)
    at = out + which * columns + column
    # No column where nothing is to be written.
    column = tl.where(exists, column, columns)
    if SHARED:
        tl.store(at, total, mask=tl.where(pieces == 1, column, columns) < columns)
        tl.atomic_add(at, total, mask=tl.where(pieces == 1, columns, column) < columns)
    else:
        tl.store(at, total, mask=column < columns)


def row_sums(
    index: Int[Tensor, " capacity"],
    ends: Int[Tensor, " sums+1"],
    weights: Float[Tensor, " capacity"],
    matrix: Float[Tensor, "rows k"],
    center: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "sums k"]:
    """Sums of weights · (matrix - center)[index] between consecutive offsets in `ends`.

    Long sums are divided among blocks that add their parts in any order, so the last bits can
    differ between runs. Under `torch.use_deterministic_algorithms(True)` one block computes each
    sum.
    """
    matrix = with_contiguous_rows(matrix)
    sums, columns = len(ends) - 1, matrix.shape[1]
    shared = not torch.are_deterministic_algorithms_enabled()
    if shared:
        out = matrix.new_zeros(sums, columns)
        lengths = ends.diff()
        pieces = (lengths + (LONGEST_PIECE - 1)).div(LONGEST_PIECE, rounding_mode="floor")
        piece_ends = pieces.clamp_(min=1).cumsum(0)
        # As many as there can be: each sum has at least one piece, and a full one for each
        # LONGEST_PIECE entries.
        n_pieces = sums + len(index) // LONGEST_PIECE
        every = torch.arange(n_pieces, device=ends.device)
        sum_of_piece = torch.searchsorted(piece_ends, every, right=True)
    else:
        out = matrix.new_empty(sums, columns)
        n_pieces, sum_of_piece, piece_ends = sums, ends, ends

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return n_pieces, triton.cdiv(columns, sizes["COLUMNS"])

    _sums_kernel[grid](
        index, ends, weights, matrix, matrix if center is None else center, out, sum_of_piece,
        piece_ends, sums, columns, matrix.stride(0), LONGEST_PIECE,
        HAS_CENTER=center is not None, SHARED=shared,
    )  # fmt: skip
    return out


def with_contiguous_rows(matrix: Float[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
    """The matrix itself where its rows are contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
