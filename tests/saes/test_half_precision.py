"""Thresholds stay float32 in half precision, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from tests.saes.twins import D_IN, StockConfig, relative_error, step, stock_config, train, twins


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_threshold_stays_float32(dtype: str) -> None:
    for extra in ({}, {"log_threshold": True}, {"hyperparameter_units": "unit_rms"}):
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig.from_dict({**stock_config(dtype=dtype).to_dict(), **extra})
        )
        half = getattr(torch, dtype)
        for moved in (sae, sae.to(half), sae.to(device="cpu", dtype=half)):
            assert moved.threshold.dtype == torch.float32
            assert moved.W_enc.dtype == half
            stored = [p.dtype for name, p in moved.named_parameters() if "threshold" in name]
            assert stored == [torch.float32]


SMALL_BANDWIDTH = 0.001
WIDE, MANY = 499, 2039  # enough pairs that a window of 0.001 holds a few hundred


def half_precision_problem() -> tuple[StockConfig, Tensor]:
    cfg = stock_config(d_sae=WIDE, jumprelu_bandwidth=SMALL_BANDWIDTH, jumprelu_init_threshold=1.0)
    return cfg, torch.randn(MANY, D_IN)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_autocast_does_not_touch_the_thresholds_gradient(path: str) -> None:
    cfg, x = half_precision_problem()
    stock, ours = twins(cfg, path)
    exact = StockSAE(stock_config(**{**vars(cfg), "dtype": "float64"}))
    exact.load_state_dict(stock.state_dict())
    step(exact, x.double(), None)
    truth = exact.threshold.grad.double()
    step(stock, x, None)
    plain_error = (stock.threshold.grad - truth).norm()
    assert (truth != 0).sum() > 50

    step(ours, x, autocast=True)
    floor = torch.finfo(torch.float32).eps * truth.norm()
    assert (ours.threshold.grad - truth).norm() <= 2 * plain_error + floor

    step(stock, x, autocast=True)
    assert relative_error(stock.threshold.grad, truth) > 0.5  # what is being avoided


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_run_under_autocast_is_the_run_without(path: str) -> None:
    cfg = stock_config(jumprelu_bandwidth=0.05, jumprelu_init_threshold=0.9)
    parameters = []
    for autocast in (False, True):
        torch.manual_seed(6)
        ours = twins(cfg, path)[1]
        train(ours, autocast=autocast)
        parameters.append(list(ours.parameters()))
    for plain, cast in zip(*parameters, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_bfloat16_weights_get_the_float32_thresholds_gradient(path: str) -> None:
    cfg, x = half_precision_problem()
    x = x.bfloat16()
    half_cfg = stock_config(**{**vars(cfg), "dtype": "bfloat16"})
    stock, ours = twins(half_cfg, path)
    full = StockSAE(cfg)
    full.load_state_dict({name: value.float() for name, value in stock.state_dict().items()})
    exact = StockSAE(stock_config(**{**vars(cfg), "dtype": "float64"}))
    exact.load_state_dict(full.state_dict())
    step(exact, x.double(), None)
    step(full, x.float(), None)
    step(ours, x, None)
    step(stock, x, None)
    truth = exact.threshold.grad.double()
    plain_error = (full.threshold.grad - truth).norm()
    floor = torch.finfo(torch.float32).eps * truth.norm()
    assert (ours.threshold.grad - truth).norm() <= 2 * plain_error + floor
    assert relative_error(stock.threshold.grad, truth) > 0.5
