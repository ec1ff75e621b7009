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
        bits = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1
        flags = tl.reshape(bits, (BLOCK * 32,))
        before = tl.cumsum(flags, 0) - flags
        to = place + before
        kept = (flags != 0) & (to < capacity)
        latent = start * 32 + tl.arange(0, BLOCK * 32)
        tl.store(rows + to, tl.zeros([BLOCK * 32], tl.int64) + row, mask=kept)
        tl.store(cols + to, latent.to(tl.int64), mask=kept)
        place += tl.sum(flags, 0)


def ends_of(counts: Int[Tensor, " segments"]) -> Int[Tensor, " segments+1"]:
    """The running sum of the counts, with 0 before it."""
    ends = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=ends[1:])
    return ends


def pairs_of(
    words: Int[Tensor, "batch words"], pairs: Int[Tensor, "2 capacity"]
) -> Int[Tensor, " batch+1"]:
    """Write the pairs whose bit is 1 into `pairs`, by token and then by latent.

    Returns:
        Each token's offsets. The last is the number of pairs, which may be more than the capacity.
    """
    batch, n_words = words.shape
    counts = words.new_empty(batch)
    block = min(64, triton.next_power_of_2(n_words))
    _count_kernel[(batch,)](words, counts, n_words, BLOCK=max(16, block))
    ends = ends_of(counts)
    _write_kernel[(batch,)](words, ends, pairs[0], pairs[1], n_words, pairs.shape[1], BLOCK=block)
    return ends


@jit
def _keep_kernel(
    keep, before, before_by_latent, pairs, z, order, new_pairs, new_z, new_order, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < capacity
    kept = tl.load(keep + at, mask=inside, other=0) != 0
    to = tl.load(before + at, mask=kept, other=0)
    tl.store(new_pairs + to, tl.load(pairs + at, mask=kept, other=0), mask=kept)
    col = tl.load(pairs + capacity + at, mask=kept, other=0)
    tl.store(new_pairs + capacity + to, col, mask=kept)
    tl.store(new_z + to, tl.load(z + at, mask=kept, other=0.0), mask=kept)
    # The same for the order by latent, whose entries have moved too.
    entry = tl.load(order + at, mask=inside, other=0)
    kept = (tl.load(keep + entry, mask=inside, other=0) != 0) & inside
    to = tl.load(before_by_latent + at, mask=kept, other=0)
    tl.store(new_order + to, tl.load(before + entry, mask=kept, other=0), mask=kept)


def keep_entries(
    keep: Bool[Tensor, " capacity"],
    before: Int[Tensor, " capacity"],
    before_by_latent: Int[Tensor, " capacity"],
    pairs: Int[Tensor, "2 capacity"],
    z: Float[Tensor, " capacity"],
    order: Int[Tensor, " capacity"],
    new_pairs: Int[Tensor, "2 capacity"],
    new_z: Float[Tensor, " capacity"],
    new_order: Int[Tensor, " capacity"],
) -> None:
    """Move the kept entries to the front of `new_pairs`, `new_z` and `new_order`.

    Args:
        keep: which entries are kept.
        before: how many kept entries are before each entry.
        before_by_latent: the same in the order by latent.
        pairs, z, order: the entries and their order by latent.
        new_pairs, new_z, new_order: where they go; places after the kept entries are not written.
    """
    capacity, block = len(z), 512
    _keep_kernel[(triton.cdiv(capacity, block),)](
        keep, before, before_by_latent, pairs, z, order, new_pairs, new_z, new_order, capacity,
        BLOCK=block,
    )  # fmt: skip
