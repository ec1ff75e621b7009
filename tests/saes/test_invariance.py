"""Training on a·x + v is the same training, for any scale a > 0 and constant vector v.

Discrete decisions (does a latent fire, which token is drawn) turn a last bit into another latent.
So the comparison is in float64, thresholds included: no decision of these runs is that close.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.units import stored
from jumprelu_plugin.training.activations.scaler import PairScaler

WIDTH, LATENTS, BATCH, STEPS = 37, 211, 257, 100

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


def tokens() -> Tensor:
    """Sparse sums of known directions; one coordinate holds most of the variance, and one token in
    a thousand is fifty times as far out as the others."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(LATENTS, WIDTH, generator=random, dtype=torch.float64)
    active = torch.rand(3001, LATENTS, generator=random, dtype=torch.float64) < 0.03
    rows = active.double() @ directions
    rows[:, 5] *= 7
    rows[::997] *= 50
    return rows


def offset() -> Tensor:
    random = torch.Generator().manual_seed(9)
    return torch.randn(WIDTH, generator=random, dtype=torch.float64)


def batches(rows: Tensor) -> Iterator[Tensor]:
    random = torch.Generator().manual_seed(1)
    while True:
        yield rows[torch.randint(0, len(rows), (BATCH,), generator=random)]


def train(rows: Tensor, **fields: Any) -> JumpReLUTrainingSAE:
    torch.manual_seed(3)
    cfg = JumpReLUTrainingSAEConfig(
        d_in=WIDTH, d_sae=LATENTS, target_l0=7.0, dtype="float64", step_kernel="sparse", **fields
    )
    sae = JumpReLUTrainingSAE(cfg)
    threshold = stored(sae, "threshold")
    threshold.data = threshold.data.double()
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=3e-3,
            lr_end=0.0,
            lr_decay_steps=20,
            dead_feature_window=20,
            n_batches_for_norm_estimate=3,
        ),
        sae=sae,
        data_provider=batches(rows),
    )
    trainer.fit()
    return sae.eval()


@cache
def trained_as_they_are(normalization: Any) -> JumpReLUTrainingSAE:
    return train(tokens(), normalize_activations=normalization)


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "none"])
@pytest.mark.parametrize(("scale", "length"), [(0.013, 0.0), (1.0, 41.0), (0.37, 300.0)])
def test_scale_and_offset_of_the_data_do_not_matter(
    normalization: Any, scale: float, length: float
) -> None:
    rows, v = tokens(), length * offset()
    plain = trained_as_they_are(normalization)
    moved = train(scale * rows + v, normalize_activations=normalization)
    x = rows[:500]
    with torch.no_grad():
        acts, moved_acts = plain.encode(x), moved.encode(scale * x + v)
        out, moved_out = plain.decode(acts), (moved.decode(moved_acts) - v) / scale
    assert 5 < float((acts > 0).sum(1).double().mean()) < 9
    torch.testing.assert_close(moved_acts / scale, acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_out, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.W_enc, plain.W_enc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.W_dec, plain.W_dec, rtol=1e-4, atol=1e-5)


def test_both_sides_of_a_transcoder_s_rows_are_invariant_apart() -> None:
    """A set's and a CLT's transcoders train on these rows and on nothing else of the data."""
    x, y = tokens(), tokens().flip(1)[:, :23]
    rows = torch.cat([x, y], dim=1)
    moved = torch.cat([0.013 * x + 41 * offset(), 317.0 * y - 3e4 * offset()[:23]], dim=1)
    found = []
    for data in (rows, moved):
        scaler = PairScaler(WIDTH, 23)
        scaler.estimate_scaling_factor(WIDTH, batches(data), 3)
        found.append(scaler(data))
        torch.testing.assert_close(scaler.unscale(found[-1]), data)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


def test_a_stock_config_keeps_stock_s_units() -> None:
    fixed = JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, l0_coefficient=0.3)
    assert not fixed.resolve().standardize_activations
    assert (
        JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=7.0)
        .resolve()
        .standardize_activations
    )
