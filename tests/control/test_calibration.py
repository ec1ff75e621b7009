"""Thresholds calibrated to a target L0 on pre-activations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.control.calibration import calibrate

ROWS, LATENTS = 509, 211


def pre_activations() -> Tensor:
    spread = torch.linspace(0.3, 2.9, LATENTS)
    return torch.randn(ROWS, LATENTS) * spread + torch.linspace(0.1, 0.4, LATENTS)


@pytest.mark.parametrize("asked", [7.0, 31.0, 83.0])
def test_calibration_gives_the_target_l0(asked: float) -> None:
    z = pre_activations()
    found = calibrate(z, asked, jumprelu_bandwidth_std=0.7)
    active = (z > found.threshold).sum(0)
    # Each latent fires on its share of the rows, right to the one row that sits on the threshold
    # and the rounding of the rank.
    assert (active - asked / LATENTS * ROWS).abs().max() <= 1.5
    assert found.bandwidth == pytest.approx(0.7 * float(z.std()))
    assert len(found.threshold.unique()) == LATENTS


def test_calibration_never_gives_a_negative_threshold() -> None:
    found = calibrate(pre_activations() - 1.0, 100.0, 1.0)
    assert found.threshold.min() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_calibration_refuses_what_is_not_finite(bad: float) -> None:
    z = pre_activations()
    z[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(z, 7.0, 1.0)


def test_calibration_refuses_activations_that_are_all_the_same() -> None:
    """The same token over and over: latents differ from each other, but none of them varies."""
    same = pre_activations()[:1].expand(ROWS, -1).clone()
    for z in (torch.full((ROWS, LATENTS), 0.3), same):
        with pytest.raises(ValueError, match="all the same"):
            calibrate(z, 7.0, 1.0)
