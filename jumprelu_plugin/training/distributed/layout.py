"""Which latents of a dictionary each process holds.

A Matryoshka prefix is the first m latents. Latents are therefore dealt by block, a block being what
lies between the ends of two prefixes: every process holds the same share of every prefix, and every
prefix costs each of them the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentLayout:
    """How d_sae latents are dealt to shards.

    Attributes:
        d_sae: latents of the whole dictionary.
        shards: how many processes hold them.
        prefixes: widths of the Matryoshka prefixes, ascending, without d_sae.

    Raises:
        ValueError: the latents, or those of a prefix, cannot be dealt evenly.
    """

    d_sae: int
    shards: int
    prefixes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.d_sae % self.shards:
            raise ValueError(
                f"d_sae is {self.d_sae:,}, which model_parallel_size={self.shards} does not "
                f"divide: give a multiple of {self.shards}, such as "
                f"{-(-self.d_sae // self.shards) * self.shards:,}"
            )
        for width in self.prefixes:
            if width % self.shards:
                raise ValueError(
                    f"a Matryoshka prefix has {width:,} latents, which model_parallel_size="
                    f"{self.shards} does not divide: give matryoshka_widths that are multiples of "
                    f"{self.shards}"
                )

    @property
    def held(self) -> int:
        """Latents of one shard."""
        return self.d_sae // self.shards

    @property
    def held_prefixes(self) -> tuple[int, ...]:
        """The prefixes' widths in one shard."""
        return tuple(width // self.shards for width in self.prefixes)

    def slices(self, shard: int) -> list[slice]:
        """The latents of one shard, block by block; one after the other they are its own order."""
        found = []
        for start, end in pairwise((0, *self.prefixes, self.d_sae)):
            size = (end - start) // self.shards
            found.append(slice(start + shard * size, start + (shard + 1) * size))
        return found

    def part(self, values: Tensor, shard: int, axis: int = 0) -> Tensor:
        """A shard's part, [… held …], of [… d_sae …] values; a copy."""
        return torch.cat([values.movedim(axis, 0)[s] for s in self.slices(shard)]).movedim(0, axis)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[d_sae, …] values from every shard's [held, …]."""
        whole = parts[0].new_empty(self.d_sae, *parts[0].shape[1:])
        for shard, part in enumerate(parts):
            self.place(part, shard, whole)
        return whole

    def place(self, part: Tensor, shard: int, whole: Tensor) -> None:
        """In place, write a shard's [held, …] values to where they belong in [d_sae, …] ones."""
        done = 0
        for piece in self.slices(shard):
            size = piece.stop - piece.start
            whole[piece] = part[done : done + size]
            done += size
