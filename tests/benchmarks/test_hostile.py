"""Data made to be hard: each set is what its name says, and the default config holds its target."""

from __future__ import annotations

import pytest
import torch

from benchmarks.architectures import PLUGIN
from benchmarks.hostile import L0, learning_rate_of, measure
from benchmarks.hostile_data import BY_NAME, SETS, Source

# A batch of 512 may hold three of the massive tokens or none. In few dimensions most latents are of
# no use: docs/results.md.
EXPECTED = {
    "massive tokens": {"loss spike"},
    "heavy tails": {"loss spike"},
    "still coordinates": {"latents dying"},
    "low rank": {"latents dying"},
    "32 wide": {"latents dying"},
}


def drawn(name: str, progress: float = 0.0, tokens: int = 6_000) -> torch.Tensor:
    return Source(BY_NAME[name], 3).draw(tokens, progress)


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.median(0).values).norm(dim=1)


def test_the_sets_are_what_their_names_say() -> None:
    spread = float(distances(drawn("plain")).median())
    assert drawn("long mean").mean(0).norm() > 9 * spread
    variance = drawn("one coordinate").var(0)
    assert variance.max() / variance.sum() > 0.7
    far = distances(drawn("massive tokens")) > 20 * spread
    assert 3e-4 < float(far.float().mean()) < 2.5e-3
    tails = distances(drawn("heavy tails"))
    assert float(tails.max() / tails.median()) > 10
    still = drawn("still coordinates").std(0)
    assert still[::2].max() < 1e-3 * still[1::2].min()
    assert int(torch.linalg.matrix_rank(drawn("low rank"), rtol=1e-4)) == 131 // 4
    assert len(drawn("duplicates").unique(dim=0)) < 800
    assert drawn("drift", 1.0).mean(0).norm() > 2 * drawn("drift").mean(0).norm()
    assert drawn("32 wide").shape[1] == 32
    assert drawn("4,096 wide", tokens=11).shape[1] == 4096


def test_a_seed_gives_the_same_batches_of_the_same_features() -> None:
    one, same, other = (Source(BY_NAME["plain"], seed).draw(511) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    # Other tokens of one distribution: their covariances agree.
    many, more = (Source(BY_NAME["plain"], seed).draw(8_000).t().cov() for seed in (5, 6))
    assert (many - more).norm() < 0.2 * more.norm()


@pytest.mark.parametrize(
    "name",
    [
        "massive tokens",
        *(
            pytest.param(hostile.name, marks=pytest.mark.slow)
            for hostile in SETS
            if hostile.name not in ("massive tokens", "drift")  # docs/results.md has the drift
        ),
    ],
)
def test_the_default_config_holds_its_target(name: str, one_thread: None) -> None:
    hostile = BY_NAME[name]
    record = measure(hostile, PLUGIN, learning_rate_of(hostile, steps=300), steps=300, seed=2)
    assert record["l0"] == pytest.approx(L0, rel=0.03)
    assert set(record["alarms"]) <= EXPECTED.get(name, set())
