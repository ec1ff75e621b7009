"""Inner products at pairs, and weighted sums of rows by token or by latent.

Both read rows of a matrix in the order of the pairs and are bound by memory. The blocks that run
together share a slab of columns, narrow enough to stay in the GPU's L2 cache while all pairs
pass over it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.step.kernels.tuning import jit, tiles

# A sum of more rows than this is divided among several blocks. A latent that fires on every token
# of a batch would otherwise be one block's work long after the others are done.
LONGEST_PIECE = 256


@tiles(
    ("columns", "HAS_CENTER", "SELECT"),
    {"ENTRIES": 64, "COLUMNS": 32},
    ({"ENTRIES": 8, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 8, "COLUMNS": 256}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 256}, 8, 2),
    ({"ENTRIES": 32, "COLUMNS": 128}, 8, 2),
    ({"ENTRIES": 8, "COLUMNS": 512}, 8, 2),
)
@jit
def _sampled_kernel(
    order, rows, cols, count, left, right, center, b_enc, edge, out, keep, keep_in_order, capacity,
    columns, left_stride, right_stride, HAS_CENTER: tl.constexpr, SELECT: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(left - center)[row] · right[col] for a block of entries, taken in `order`; and with SELECT,
    plus b_enc[col], and whether that exceeds edge[col]."""
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
    found = tl.sum(products, 1)
    if SELECT:
        found += tl.load(b_enc + col, mask=used, other=0.0)
        kept = (found > tl.load(edge + col, mask=used, other=0.0)) & used
        tl.store(keep + entry, kept, mask=at < capacity)
        tl.store(keep_in_order + at, kept, mask=at < capacity)
    tl.store(out + entry, found, mask=at < capacity)


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
    return _at_pairs(order, rows, cols, count, left, right, center, None)[0]


def pre_activations(
    order: Int[Tensor, " capacity"],
    rows: Int[Tensor, " capacity"],
    cols: Int[Tensor, " capacity"],
    count: Int[Tensor, ""],
    x: Float[Tensor, "batch d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    center: Float[Tensor, " d_in"] | None,
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
) -> tuple[Float[Tensor, " capacity"], Bool[Tensor, " capacity"], Bool[Tensor, " capacity"]]:
    """z at pairs, whether each exceeds its latent's edge, and the same taken in `order`.

    The arguments are those of `sampled_product` and `select.select`; unused entries exceed nothing.
    """
    return _at_pairs(order, rows, cols, count, x, weight, center, (b_enc, edge))


def _at_pairs(
    order: Tensor,
    rows: Tensor,
    cols: Tensor,
    count: Tensor,
    left: Tensor,
    right: Tensor,
    center: Tensor | None,
    select: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = with_contiguous_rows(left), with_contiguous_rows(right)
    out = left.new_empty(len(order))
    # Not written without `select`.
    keep, keep_in_order = out.new_empty(2, 1 if select is None else len(order), dtype=torch.bool)
    b_enc, edge = (out, out) if select is None else select
    capacity, columns = len(order), left.shape[1]

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(capacity, sizes["ENTRIES"]),)

    _sampled_kernel[grid](
        order, rows, cols, count, left, right, left if center is None else center, b_enc, edge,
        out, keep, keep_in_order, capacity, columns, left.stride(0), right.stride(0),
        HAS_CENTER=center is not None, SELECT=select is not None,
    )  # fmt: skip
    return out, keep, keep_in_order


@tiles(
    ("columns", "sums", "SHARED"),
    {"ENTRIES": 64, "COLUMNS": 32},
    ({"ENTRIES": 8, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 128}, 4, 2),
    ({"ENTRIES": 4, "COLUMNS": 256}, 4, 2),
    ({"ENTRIES": 16, "COLUMNS": 256}, 8, 2),
    ({"ENTRIES": 4, "COLUMNS": 512}, 4, 2),
    ({"ENTRIES": 8, "COLUMNS": 512}, 8, 2),
    ({"ENTRIES": 2, "COLUMNS": 1024}, 4, 2),
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


@jit
def _zero_divided_kernel(out, piece_ends, columns, BLOCK: tl.constexpr):
    """Zeros where several blocks will add their parts of one sum."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(piece_ends + row - 1, mask=row > 0, other=0)
    if tl.load(piece_ends + row) - before > 1:
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(out + row * columns + at, tl.zeros([BLOCK], tl.float32), mask=at < columns)


@dataclass(frozen=True)
class Pieces:
    """Long sums, divided among several blocks.

    Attributes:
        ends: how many pieces the sums have up to and including each.
        of: the sum that each piece belongs to. There is one for each piece there can be; those
            that are not needed belong to none.
    """

    ends: Int[Tensor, " sums"]
    of: Int[Tensor, " pieces"]

    @classmethod
    def of_sums(cls, ends: Int[Tensor, " sums+1"], entries: int) -> Pieces:
        """Pieces of at most `LONGEST_PIECE` entries of sums between consecutive offsets."""
        pieces = (ends.diff() + (LONGEST_PIECE - 1)).div(LONGEST_PIECE, rounding_mode="floor")
        piece_ends = pieces.clamp_(min=1).cumsum(0)
        # Each sum has at least one piece, and a full one for each LONGEST_PIECE entries.
        at_most = len(pieces) + entries // LONGEST_PIECE
        every = torch.arange(at_most, device=ends.device)
        return cls(piece_ends, torch.searchsorted(piece_ends, every, right=True))


def row_sums(
    index: Int[Tensor, " capacity"],
    ends: Int[Tensor, " sums+1"],
    weights: Float[Tensor, " capacity"],
    matrix: Float[Tensor, "rows k"],
    center: Float[Tensor, " k"] | None = None,
    pieces: Pieces | None = None,
) -> Float[Tensor, "sums k"]:
    """Sums of weights · (matrix - center)[index] between consecutive offsets in `ends`.

    Args:
        pieces: how long sums are divided among blocks, which add their parts in any order, so that
            the last bits can differ between runs; None lets one block compute each sum.
    """
    matrix = with_contiguous_rows(matrix)
    sums, columns = len(ends) - 1, matrix.shape[1]
    out = matrix.new_empty(sums, columns)
    n_pieces, of_piece, piece_ends = sums, ends, ends
    if pieces is not None:
        n_pieces, of_piece, piece_ends = len(pieces.of), pieces.of, pieces.ends
        _zero_divided_kernel[(sums,)](out, piece_ends, columns, BLOCK=512)

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return n_pieces, triton.cdiv(columns, sizes["COLUMNS"])

    _sums_kernel[grid](
        index, ends, weights, matrix, matrix if center is None else center, out, of_piece,
        piece_ends, sums, columns, matrix.stride(0), LONGEST_PIECE,
        HAS_CENTER=center is not None, SHARED=pieces is not None,
    )  # fmt: skip
    return out


def with_contiguous_rows(matrix: Float[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
    """The matrix itself where its rows are contiguous, else a copy."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
