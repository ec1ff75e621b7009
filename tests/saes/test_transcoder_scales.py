"""The scales of a transcoder's two sides, and folding them into the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSkipTranscoder, JumpReLUTranscoder
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig
from torch import Tensor

from jumprelu_plugin.saes.parameters import fold_scales_
from jumprelu_plugin.saes.transcoder import JumpReLUTrainingTranscoder
from jumprelu_plugin.training.activations.scaler import PairScaler
from tests.saes.transcoders import BATCH, D_IN, D_OUT, D_SAE, batches, make, trainer_for


def trained(steps: int, skip: bool, **scales: float) -> JumpReLUTrainingTranscoder:
    torch.manual_seed(5)
    sae = make(skip, step_kernel="sparse")
    trainer_for(sae, steps, **scales).fit()
    return sae.eval()


@pytest.mark.parametrize("skip", [False, True])
def test_the_data_s_scale_does_not_matter(skip: bool) -> None:
    """f trained on (αx, βy) is β f(·/α) trained on (x, y).

    Powers of two, so that scaling rounds nothing: a threshold can be a sample's own value, where a
    last bit decides whether a latent fires.
    """
    alpha, beta = 2.0**5, 2.0**-7
    plain = trained(7, skip)
    scaled = trained(7, skip, scale_in=alpha, scale_out=beta)
    x = batches(3)[2][:, :D_IN]
    assert plain.cfg.normalize_activations == scaled.cfg.normalize_activations == "none"
    assert plain(x).std() > 0.1
    torch.testing.assert_close(scaled(alpha * x) / beta, plain(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.encode(alpha * x), plain.encode(x), rtol=1e-6, atol=0)


def test_each_side_has_its_own_root_mean_square() -> None:
    scaler = PairScaler(D_IN, D_OUT)
    data = batches(4, scale_in=3.7, scale_out=0.013)
    scaler.estimate_scaling_factor(D_IN, iter(data), 4)
    scaled = scaler(torch.cat(data))
    for side in scaled.split([D_IN, D_OUT], 1):
        assert side.square().sum(1).mean().item() == pytest.approx(D_IN, rel=1e-5)
    torch.testing.assert_close(scaler.unscale(scaled), torch.cat(data))


def with_massive_outputs(rows: list[Tensor]) -> list[Tensor]:
    """The same rows, one output in every fourth batch 400 times as long; the input tells which."""
    rows = [batch.clone() for batch in rows]
    for batch in rows[::4]:
        batch[7, 5] += 20
        batch[7, D_IN:] *= 400
    return rows


def test_massive_activations_do_not_set_the_scale() -> None:
    usual, massive = (PairScaler(D_IN, D_OUT, centers=False) for _ in range(2))
    usual.estimate_scaling_factor(D_IN, iter(batches(4)), 4)
    massive.estimate_scaling_factor(D_IN, iter(with_massive_outputs(batches(4))), 4)
    assert massive.scaling_factor[0] == pytest.approx(usual.scaling_factor[0], rel=0.02)
    squares = [0.0, 0.0]
    for batch in with_massive_outputs(batches(4)):
        norms = batch[:, D_IN:].norm(dim=1)
        squares[0] += float(norms.clamp_max(10 * norms.median()).square().sum())
        squares[1] += float(norms.square().sum())
    counted, in_full = (4 * BATCH * D_IN / total for total in squares)
    assert massive.scaling_factor[1] ** 2 == pytest.approx(counted, rel=1e-5)
    assert in_full < counted / 100


@pytest.mark.parametrize("bad", [0.0, torch.inf])
def test_a_side_without_a_scale_is_refused(bad: float) -> None:
    rows = batches(1)[0]
    rows[:, D_IN:] = bad
    with pytest.raises(ValueError, match="output hook's activations"):
        PairScaler(D_IN, D_OUT).estimate_scaling_factor(D_IN, iter([rows]), 1)


@pytest.mark.parametrize("skip", [False, True])
def test_folding_moves_the_scales_into_the_weights(skip: bool) -> None:
    sae = make(
        skip, hyperparameter_units="unit_rms", log_threshold=True, jumprelu_init_threshold=0.2
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = batches(1)[0][:, :D_IN]
    scale_in, scale_out = 0.31, 7.9
    expected, acts = sae(scale_in * x).detach() / scale_out, sae.encode(scale_in * x).detach()
    assert 0 < (acts > 0).float().mean() < 1
    sae.fold_activation_norm_scaling_factor((scale_in, scale_out))
    torch.testing.assert_close(sae(x).detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x).detach(), acts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_stock_objects_fold_alike(skip: bool) -> None:
    kind = JumpReLUSkipTranscoder if skip else JumpReLUTranscoder
    config = JumpReLUSkipTranscoderConfig if skip else JumpReLUTranscoderConfig
    cfg = config(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False)
    stock: Any = kind(cfg)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    x = batches(1)[0][:, :D_IN]
    expected = stock(0.31 * x).detach() / 7.9
    fold_scales_(stock, 0.31, 7.9)
    torch.testing.assert_close(stock(x).detach(), expected, rtol=1e-5, atol=1e-5)
