"""Streaming metrics against two passes in NumPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jumprelu_plugin.evaluation import StreamingMetrics
from tests.evaluation.two_passes import two_pass


def made_up(n=97, d=11, d_sae=29, seed=3, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(n, d, generator=generator, dtype=torch.float64)
    x_hat = x + 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    rates = torch.rand(d_sae, generator=generator) ** 4
    rates[:3] = 0.0
    acts = torch.rand(n, d_sae, generator=generator) + 0.1
    acts = acts * (torch.rand(n, d_sae, generator=generator) < rates)
    return x, x_hat, acts.double()


def streamed(x, x_hat, acts, sizes=(97,)):
    metrics = StreamingMetrics()
    for part in zip(x.split(sizes), x_hat.split(sizes), acts.split(sizes), strict=True):
        metrics.update(*part)
    return metrics.compute()


def numbers(metrics):
    return {k: v for k, v in vars(metrics).items() if k != "firing_frequency"}


@pytest.mark.parametrize("sizes", [(97,), (1, 2, 5, 89), (48, 0, 49), (1,) * 97])
def test_metrics_equal_two_passes_in_numpy_however_the_tokens_are_cut(sizes):
    x, x_hat, acts = made_up()
    expected = two_pass(x, x_hat, acts)
    assert 0 < expected["share_above_10_percent"] < expected["share_above_1_percent"] < 1
    assert expected["dead_share"] >= 3 / 29
    found = streamed(x, x_hat, acts, sizes)
    assert numbers(found) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(found.firing_frequency, (acts != 0).double().mean(0), rtol=1e-15)


@pytest.mark.parametrize("coalesced", [True, False])
def test_metrics_take_sparse_latents_and_ignore_explicit_zeros(coalesced):
    x, x_hat, acts = made_up()
    sparse = acts.to_sparse_coo()
    silent = torch.tensor([[0, 1, 1], [1, 1, 1]])  # explicit zeros of a latent that never fires
    with_zeros = torch.sparse_coo_tensor(
        torch.cat([sparse.indices(), silent], dim=1),
        torch.cat([sparse.values(), torch.zeros(3, dtype=torch.float64)]),
        size=acts.shape,
    )
    metrics = StreamingMetrics()
    metrics.update(x, x_hat, with_zeros.coalesce() if coalesced else with_zeros)
    assert numbers(metrics.compute()) == numbers(streamed(x, x_hat, acts))


def test_a_mean_far_larger_than_the_spread_costs_no_digits():
    # Σx² − N·mean² would leave nothing: 1e16 relative to a variance of 1.
    x, x_hat, acts = made_up(mean=1e8)
    found = streamed(x, x_hat, acts, (13,) * 7 + (6,))
    assert found.fvu == pytest.approx(two_pass(x, x_hat, acts)["fvu"], rel=1e-7)
    centred = x - x.mean(0)
    assert found.fvu == pytest.approx(two_pass(centred, centred + (x_hat - x), acts)["fvu"], 1e-7)


def test_closed_forms():
    x, _, acts = made_up()
    assert streamed(x, x, acts).fvu == 0.0
    assert streamed(x, x, acts).cosine == pytest.approx(1.0, rel=1e-12)
    assert streamed(x, x.mean(0).expand_as(x), acts).fvu == pytest.approx(1.0, rel=1e-12)
    centred = x - x.mean(0)
    assert streamed(centred, 0.25 * centred, acts).fvu == pytest.approx(0.75**2, rel=1e-12)
    assert streamed(x, -3 * x, acts).cosine == pytest.approx(-1.0, rel=1e-12)
    assert streamed(x, torch.zeros_like(x), acts).cosine == 0.0
    four = torch.tensor([[0.0, 1, 0, 2, 0], [0, 3, 0, 0, 0]])
    found = streamed(x[:2], x[:2] + 2, four, (2,))
    assert (found.l0, found.dead_share, found.mse) == (1.5, 0.6, pytest.approx(4.0))


def test_low_precision_input_is_summed_in_float64():
    x, x_hat, acts = made_up()
    half = (x.bfloat16(), x_hat.bfloat16(), acts)
    assert numbers(streamed(*half, (50, 47))) == pytest.approx(two_pass(*half), rel=1e-12)


def test_metrics_refuse_what_they_cannot_sum():
    x, x_hat, acts = made_up()
    metrics = StreamingMetrics()
    with pytest.raises(ValueError, match="at least 2 tokens and have seen 0"):
        metrics.compute()
    with pytest.raises(ValueError, match="no mean"):
        _ = metrics.mean
    with pytest.raises(ValueError, match=r"x \(97, 11\), x_hat \(97, 10\), acts \(97, 29\)"):
        metrics.update(x, x_hat[:, 1:], acts)
    with pytest.raises(ValueError, match="Expected x and x_hat"):
        metrics.update(x, x_hat, acts[1:])
    for bad in (float("nan"), float("inf")):
        broken = x_hat.clone()
        broken[5, 7] = bad
        with pytest.raises(ValueError, match="NaN or an infinity"):
            metrics.update(x, broken, acts)
    metrics.update(x[:1], x_hat[:1], acts[:1])
    with pytest.raises(ValueError, match="have seen 1"):
        metrics.compute()
    with pytest.raises(ValueError, match="29 latents"):
        metrics.update(x, x_hat, acts[:, 1:])
    with pytest.raises(ValueError, match="width 11"):
        metrics.update(x[:, 1:], x_hat[:, 1:], acts)
    with pytest.raises(ValueError, match="identical"):
        streamed(x[:1].expand(5, -1), x_hat[:5], acts[:5], (5,))
