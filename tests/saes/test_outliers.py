"""Tokens of outlying norm: how much they count in the loss and in the calibration."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.step.losses import outlier_token_weights, reconstruction
from tests.saes.frequent_features import (
    LATENTS,
    TARGET,
    WIDTH,
    steered,
    tokens_with_frequent_features,
)

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


def test_an_outlier_counts_as_if_it_were_no_longer_than_the_limit() -> None:
    target = torch.randn(67, 13, generator=torch.Generator().manual_seed(3))
    target[11] *= 150
    norm = target.norm(dim=1)
    worth = outlier_token_weights(target, 5.0)
    assert (worth[norm <= 5 * norm.median()] == 1).all()
    assert float(worth[11].sqrt() * norm[11]) == pytest.approx(float(5 * norm.median()), rel=1e-5)
    x_hat = 0.9 * target
    expected = (worth[:, None] * (x_hat - target).square()).sum() / 67
    torch.testing.assert_close(reconstruction(x_hat, target, worth), expected)
    silent = torch.zeros(5, 13)
    silent[2] = 1.7  # the median norm is 0, and says nothing
    assert (outlier_token_weights(silent, 5.0) == 1).all()


def test_only_l0_controlled_saes_limit_outliers_by_default() -> None:
    plain = JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET)
    assert plain.resolve().outlier_norm_ratio == 10
    transcoder = JumpReLUTrainingTranscoderConfig(d_in=WIDTH, d_sae=LATENTS, target_l0=TARGET)
    assert transcoder.resolve().outlier_norm_ratio == math.inf
    assert replace(transcoder, outlier_norm_ratio=7.0).resolve().outlier_norm_ratio == 7
    assert replace(plain, outlier_norm_ratio=0.0).resolve().outlier_norm_ratio == math.inf
    assert replace(plain, l0_coefficient=0.3).resolve().outlier_norm_ratio == math.inf
    assert (
        replace(plain, l0_coefficient=0.3, outlier_norm_ratio=7.0).resolve().outlier_norm_ratio == 7
    )
    with pytest.raises(ValueError, match="outlier_norm_ratio is -1"):
        JumpReLUTrainingSAE(replace(plain, outlier_norm_ratio=-1.0))


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_an_outlier_weighs_less_in_every_prefix(path: Literal["sparse", "dense"]) -> None:
    torch.manual_seed(5)
    sae = JumpReLUTrainingSAE(
        steered(matryoshka_widths=[23, 97], matryoshka_loss_weight=0.7, step_kernel=path)
    )
    x = next(tokens_with_frequent_features())[:307]
    x[41] *= 150
    out = sae.training_forward_pass(TrainStepInput(x, {"l0": 1.0}, None, 0, False))
    limit = sae.cfg.resolve().outlier_norm_ratio
    assert limit < math.inf
    assert sae.standardization is not None
    center, scale = sae.standardization.center, sae.standardization.scale
    acts, weights = out.feature_acts.to_dense(), outlier_token_weights(x, limit, center)
    assert float(weights.min()) < 0.01
    errors = {}
    for m in (23, 97, LATENTS):
        squares = (acts[:, :m] @ sae.W_dec[:m] + sae.b_dec - x).square().sum(1)
        errors[m] = weights @ squares / len(x) / scale**2
    torch.testing.assert_close(out.losses["mse_loss"], errors[LATENTS] / 1.7)
    for m in (23, 97):
        torch.testing.assert_close(out.losses[f"matryoshka_mse_loss_{m}"], 0.35 / 1.7 * errors[m])


def test_an_outlier_in_the_first_batch_does_not_widen_the_bandwidth() -> None:
    x = next(tokens_with_frequent_features())[:307]
    with_outlier = torch.cat([x, 150 * x[41:42]])
    found = []
    for batch in (x, with_outlier):
        torch.manual_seed(5)
        sae = JumpReLUTrainingSAE(steered())
        sae.training_forward_pass(TrainStepInput(batch, {"l0": 1.0}, None, 0, False))
        found.append((sae.bandwidth, float(sae.threshold.mean()), float(sae.b_dec.sum())))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
