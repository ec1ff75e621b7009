"""The quality benchmarks' architectures train and save, and are evaluated as SAELens loads them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.architectures import ARCHITECTURES
from benchmarks.quality import as_saved, batches, table, train

D_IN, D_SAE = 17, 64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_saves(name: str) -> None:
    torch.manual_seed(1)
    rows = torch.randn(611, D_IN)
    sae = ARCHITECTURES[name](D_IN, D_SAE, 4.0)
    before = sae.W_dec.detach().clone()
    train(sae, rows, steps=4, batch=128, lr=1e-3, seed=3)
    assert not torch.equal(sae.W_dec, before)
    loaded = as_saved(sae)
    with torch.no_grad():
        assert torch.isfinite(loaded.decode(loaded.encode(rows))).all()


def test_batches_are_the_seeds_and_cover_the_rows() -> None:
    rows = torch.arange(12.0).unsqueeze(1)
    one, same, other = (batches(rows, 4, seed) for seed in (5, 5, 6))
    first = [next(one) for _ in range(3)]
    assert sorted(torch.cat(first).flatten().tolist()) == rows.flatten().tolist()
    assert all(torch.equal(a, next(same)) for a in first)
    assert not all(torch.equal(a, next(other)) for a in first)


def test_the_table_shows_mean_and_spread() -> None:
    records = [{"who": "a", "x": 1.0}, {"who": "a", "x": 3.0}, {"who": "b", "x": 5.0}]
    shown = table("t", records, "who", ("x",))
    assert list(shown.columns[1].cells) == ["2.0000 ± 1.4142", "5.0000 ± 0.0000"]
