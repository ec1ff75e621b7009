"""Activations made to order to be hard to train on, each in one way that real ones are.

A plain set is a sparse sum of known directions with a little noise. The others change one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "tokens d_in"]

FEATURES_A_TOKEN = 12.0
NOISE = 0.02


@dataclass(frozen=True)
class HostileSet:
    """One kind of hostile data.

    Attributes:
        name: what is hostile in it.
        d_in: width.
        change: turns plain rows into hostile ones, given how much of the run is over, 0 to 1.
    """

    name: str
    d_in: int
    change: Callable[[Rows, float, torch.Generator], Rows]


class Source:
    """Draws batches of a hostile set; the same seed gives the same features and batches."""

    def __init__(self, hostile: HostileSet, seed: int):
        self._set = hostile
        fixed = torch.Generator().manual_seed(1_000)
        count = min(8 * hostile.d_in, 2_048)
        directions = torch.randn(count, hostile.d_in, generator=fixed)
        self._directions = directions / directions.norm(dim=1, keepdim=True)
        density = 1.0 / (torch.arange(count) + 8.0)
        self._density = (FEATURES_A_TOKEN * density / density.sum()).clamp_max(0.5)
        self._random = torch.Generator().manual_seed(seed)

    def draw(self, tokens: int, progress: float = 0.0) -> Rows:
        """So many tokens as they are when this share of the run is over."""
        random = self._random
        active = torch.rand(tokens, len(self._density), generator=random) < self._density
        sizes = 1.0 + 0.3 * torch.randn(active.shape, generator=random)
        rows = (active * sizes.clamp_min(0.0)) @ self._directions
        noise = torch.randn(rows.shape, generator=random)
        rows += NOISE * noise * rows.norm(dim=1).mean() / rows.shape[1] ** 0.5
        return self._set.change(rows, progress, random)


def _direction(d_in: int, seed: int) -> Float[Tensor, " d_in"]:
    drawn = torch.randn(d_in, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def _spread(rows: Rows) -> float:
    return float((rows - rows.mean(0)).norm(dim=1).mean())


def _plain(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    return rows


def _long_mean(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    return rows + 10.0 * _spread(rows) * _direction(rows.shape[1], 1)


def _one_coordinate(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """Three quarters of the variance in one coordinate."""
    rows[:, 3] += 1.7 * _spread(rows) * torch.randn(len(rows), generator=random)
    return rows


def _massive_tokens(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """One token in a thousand is forty times as far out as the others, in one direction."""
    massive = torch.rand(len(rows), generator=random) < 1e-3
    rows[massive] += 40.0 * _spread(rows) * _direction(rows.shape[1], 2)
    return rows


def _heavy_tails(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """Each token's length times a Pareto variable of index 2.5."""
    lengths = torch.rand(len(rows), 1, generator=random).clamp_min(1e-6) ** (-1 / 2.5)
    return rows * lengths


def _still_coordinates(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """Half of the coordinates have a ten-thousandth of the others' spread."""
    rows[:, ::2] *= 1e-4
    return rows


def _low_rank(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """In a subspace of a quarter of the width."""
    d_in = rows.shape[1]
    basis = torch.randn(d_in, d_in // 4, generator=torch.Generator().manual_seed(3))
    q = torch.linalg.qr(basis).Q
    return rows @ q @ q.t()


def _duplicates(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """A third of the tokens are one token, and every other one is there eight times."""
    repeated = rows[: max(1, len(rows) // 8)]
    rows = repeated.repeat(8, 1)[: len(rows)].clone()
    first = torch.rand(len(rows), generator=random) < 1 / 3
    rows[first] = _direction(rows.shape[1], 4) * _spread(rows)
    return rows


def _drift(rows: Rows, progress: float, random: torch.Generator) -> Rows:
    """The mean moves by three spreads during the run, and the scale doubles."""
    moved = rows + 3.0 * progress * _spread(rows) * _direction(rows.shape[1], 5)
    return moved * 2.0**progress


SETS = (
    HostileSet("plain", 67, _plain),
    HostileSet("long mean", 67, _long_mean),
    HostileSet("one coordinate", 67, _one_coordinate),
    HostileSet("massive tokens", 67, _massive_tokens),
    HostileSet("heavy tails", 67, _heavy_tails),
    HostileSet("still coordinates", 67, _still_coordinates),
    HostileSet("low rank", 131, _low_rank),
    HostileSet("duplicates", 67, _duplicates),
    HostileSet("drift", 67, _drift),
    HostileSet("32 wide", 32, _plain),
    HostileSet("4,096 wide", 4_096, _plain),
)
BY_NAME = {hostile.name: hostile for hostile in SETS}
