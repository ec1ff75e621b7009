"""The pairs from one bit a pair, and the pairs that are kept of those: in order, without a sort.

Each token counts its bits, a running sum of the counts says where its pairs begin, and each token
then writes its pairs there. Counts and places are integers, so the outcome is the same at every
run. Pairs for which a buffer has no room are not written; the counts say how many there were.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.step.kernels.tuning import jit


@jit
def _ones(words):
    """How many bits of each word are 1."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return (sixteens + (sixteens >> 16)) & 0x3F


@jit
def _count_kernel(words, counts, n_words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(words + row * n_words + at, mask=at < n_words, other=0)
        total += _ones(word.to(tl.uint32, bitcast=True)).to(tl.int32)
    tl.store(counts + row, tl.sum(total, 0))


@jit
def _write_kernel(words, ends, rows, cols, n_words, capacity, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(ends + row)
    for start in range(0, n_words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(words + row * n_words + at, mask=at < n_words, other=0)
        word = word.to(tl.uint32, bitcast=True)
        count = _ones(word).to(tl.int32)
        to = place + tl.cumsum(count, 0) - count
        place += tl.sum(count, 0)
        # Few bits are 1, so each word gives up its lowest one in turn, until all are empty.
        for _ in range(tl.max(count, 0)):  # type: ignore[arg-type]
            below = _ones((word & (~word + 1)) - 1)  # how many bits are below the lowest one
            kept = (word != 0) & (to < capacity)
            tl.store(rows + to, tl.zeros([BLOCK], tl.int32) + tl.program_id(0), mask=kept)
            tl.store(cols + to, at * 32 + below.to(tl.int32), mask=kept)
            word = word & (word - 1)
            to += 1


def ends_of(counts: Int[Tensor, " segments"]) -> Int[Tensor, " segments+1"]:
    """The running sum of the counts, with 0 before it."""
    ends = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=ends[1:])
    return ends


def pairs_of(
    words: Int[Tensor, "batch words"],
    rows: Int[Tensor, " capacity"],
    cols: Int[Tensor, " capacity"],
) -> Int[Tensor, " batch+1"]:
    """Write the pairs whose bit is 1 into `rows` and `cols`, by token and then by latent.

    Returns:
        Each token's offsets. The last is the number of pairs, which may be more than the capacity.
    """
    batch, n_words = words.shape
    counts = words.new_empty(batch)
    block = min(1024, max(16, triton.next_power_of_2(n_words)))
    _count_kernel[(batch,)](words, counts, n_words, BLOCK=block)
    ends = ends_of(counts)
    _write_kernel[(batch,)](words, ends, rows, cols, n_words, len(rows), BLOCK=block)
    return ends


@jit
def _keep_kernel(
    keep, before, before_by_latent, rows, cols, z, order, new_pairs, new_z, new_order, capacity,
    batch, d_sae, unused_z, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < capacity
    kept = tl.load(keep + at, mask=inside, other=0) != 0
    to = tl.load(before + at, mask=kept, other=0)
    row = tl.load(rows + at, mask=kept, other=0)
    col = tl.load(cols + at, mask=kept, other=0)
    tl.store(new_pairs + to, row.to(tl.int64), mask=kept)
    tl.store(new_pairs + capacity + to, col.to(tl.int64), mask=kept)
    tl.store(new_z + to, tl.load(z + at, mask=kept, other=0.0), mask=kept)
    # The same for the order by latent, whose entries have moved too.
    entry = tl.load(order + at, mask=inside, other=0)
    kept = (tl.load(keep + entry, mask=inside, other=0) != 0) & inside
    to = tl.load(before_by_latent + at, mask=kept, other=0)
    tl.store(new_order + to, tl.load(before + entry, mask=kept, other=0), mask=kept)
    # Unused entries name tokens and latents in turn: sums that add zeros to all of them by atomic
    # operations would queue at a single one.
    unused = inside & (at >= tl.load(before + capacity))
    tl.store(new_pairs + at, at % batch, mask=unused)
    tl.store(new_pairs + capacity + at, at % d_sae, mask=unused)
    tl.store(new_z + at, tl.zeros([BLOCK], tl.float32) + unused_z, mask=unused)
    tl.store(new_order + at, at, mask=unused)


def keep_entries(
    keep: Bool[Tensor, " capacity"],
    before: Int[Tensor, " capacity+1"],
    before_by_latent: Int[Tensor, " capacity+1"],
    rows: Int[Tensor, " capacity"],
    cols: Int[Tensor, " capacity"],
    z: Float[Tensor, " capacity"],
    order: Int[Tensor, " capacity"],
    *,
    batch: int,
    d_sae: int,
    unused_z: float,
) -> tuple[Int[Tensor, "2 capacity"], Float[Tensor, " capacity"], Int[Tensor, " capacity"]]:
    """The kept entries' pairs, z and order by latent, moved to the front; unused ones after them.

    Args:
        keep: which entries are kept.
        before: how many kept entries are before each entry, and before the end.
        before_by_latent: the same in the order by latent.
        rows, cols, z, order: the entries and their order by latent.
        batch, d_sae: what unused entries may name.
        unused_z: their z.
    """
    capacity, block = len(z), 512
    pairs, new_z, new_order = (
        order.new_empty(2, capacity),
        torch.empty_like(z),
        order.new_empty(capacity),
    )
    _keep_kernel[(triton.cdiv(capacity, block),)](
        keep, before, before_by_latent, rows, cols, z, order, pairs, new_z, new_order, capacity,
        batch, d_sae, unused_z, BLOCK=block,
    )  # fmt: skip
    return pairs, new_z, new_order
