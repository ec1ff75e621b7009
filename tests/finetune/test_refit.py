"""Thresholds refitted to a target L0, against closed forms and held-out tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from jumprelu_plugin.finetune.refit import (
    RefitSettings,
    max_l0,
    mean_l0,
    refit,
    refit_to_each,
    shift_thresholds,
)
from jumprelu_plugin.models.number_lists import numbers
from jumprelu_plugin.saes.parameters import Parameters
from tests.finetune.l0_targets import D_IN, TOKENS, activations, l0_of
from tests.tiny import tiny_sae

pytestmark = pytest.mark.usefixtures("one_thread")


def untrained(d_sae: int = 67) -> Parameters:
    """Random directions that are read and written alike, with free norms; L0 about 10."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(d_sae, D_IN, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    norms = torch.linspace(0.4, 1.6, d_sae)
    return Parameters(
        W_enc=rows.T / norms,
        b_enc=torch.zeros(d_sae),
        W_dec=rows * norms[:, None],
        b_dec=torch.linspace(-1, 1, D_IN),
        threshold=2.3 / norms,
        subtracts_b_dec=True,
    )


def loaded(parameters: Parameters) -> Any:
    """The stock SAE with these parameters."""
    sae = tiny_sae(d_in=parameters.d_in, d_sae=parameters.d_sae)
    sae.cfg.apply_b_dec_to_input = parameters.subtracts_b_dec
    sae.load_state_dict(parameters.tensors())
    return sae


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("target", [3, 7.5, 17])
def test_one_shift_reaches_the_target_exactly(subtracts: bool, target: float) -> None:
    sae = tiny_sae()
    sae.cfg.apply_b_dec_to_input = subtracts
    before, x = Parameters.of(sae), activations(3)
    after = shift_thresholds(before, target, x)
    assert l0_of(loaded(after), x) == pytest.approx(target, abs=1.01 / TOKENS)
    shift = (after.threshold - before.threshold) * before.W_dec.norm(dim=1)
    moved = shift[after.threshold > 0]
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=1e-4, atol=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_the_maximum_l0_is_that_of_thresholds_at_zero() -> None:
    sae = tiny_sae()
    x, parameters = activations(3), Parameters.of(sae)
    positive = float((x @ sae.W_enc - sae.b_dec @ sae.W_enc + sae.b_enc > 0).sum()) / len(x)
    assert max_l0(parameters, x) == pytest.approx(positive, abs=2 / TOKENS)
    assert mean_l0(parameters, x) == pytest.approx(l0_of(sae, x), abs=2 / TOKENS)
    shift_thresholds(parameters, positive - 0.01, x)
    for refuse in (
        lambda: shift_thresholds(parameters, positive + 0.01, x),
        lambda: list(refit_to_each(parameters, [5, positive + 0.01], x, RefitSettings(steps=0))),
    ):
        with pytest.raises(ValueError, match=f"with every threshold at 0, {positive:.3g}"):
            refuse()


def test_trained_thresholds_are_those_of_the_closed_form() -> None:
    """Orthonormal decoder, W_enc = W_decᵀ, b_enc = c: with z_i kept, latent i leaves an error of
    c_i², without it (z_i - c_i)². An activation at θ_i therefore lowers the error by θ_i² - 2 θ_i
    c_i, which at the optimum is λ for all of them: θ_i = c_i + √(c_i² + λ).
    """
    d = 23
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    offset = torch.linspace(-0.9, 0.9, d)
    spread = torch.linspace(1, 2, d).roll(7)
    x = (torch.randn(60_013, d, generator=generator) * spread) @ rotation
    before = Parameters(
        W_enc=rotation.T.contiguous(),
        b_enc=offset,
        W_dec=rotation,
        b_dec=torch.zeros(d),
        threshold=1 + torch.rand(d, generator=generator),
    )
    target = 4.7
    settings = RefitSettings(steps=400, batch_tokens=3001, lr=3e-2)
    after = refit(before, target, x, settings)

    z = x @ before.W_enc + offset
    low, high = 0.0, 100.0
    for _ in range(50):  # λ by bisection on the L0 of the closed form
        multiplier = (low + high) / 2
        best = offset + (offset.square() + multiplier).sqrt()
        low, high = (
            (multiplier, high) if float((z > best).sum()) / len(z) > target else (low, multiplier)
        )
    assert l0_of(loaded(after), x[:32_768]) == pytest.approx(target, abs=1e-3)
    torch.testing.assert_close(after.threshold, best, rtol=0.06, atol=0.0)
    # One shift is far from it.
    gap = (shift_thresholds(before, target, x).threshold / best - 1).abs().max()
    assert gap > 0.25


@pytest.mark.parametrize("train", ["thresholds", "decoder", "all"])
def test_refits_up_and_down_reach_the_target_on_held_out_tokens(train: str) -> None:
    before, x, held_out = untrained(), activations(3, 20_011), activations(4, 20_021)
    targets = [4, 7, 13, 19, 25]
    assert 7 < mean_l0(before, x) < 13 and max_l0(before, x) > 25
    settings = RefitSettings(train=train, steps=60, batch_tokens=1009)
    found = dict(refit_to_each(before, targets, x, settings))
    assert sorted(found) == targets
    for target, parameters in found.items():
        point = loaded(parameters)
        assert l0_of(point, held_out) == pytest.approx(target, rel=0.03)
        error = float((point(held_out) - held_out).square().sum())
        shift = loaded(shift_thresholds(before, target, x))
        at_once = float((shift(held_out) - held_out).square().sum())
        # All latents are alike here: thresholds alone have nothing to gain, and the others have.
        assert error < (1.005 if train == "thresholds" else 0.9) * at_once
        if train != "all":
            assert torch.equal(parameters.W_enc, before.W_enc)
        if train == "thresholds":
            assert parameters.subtracts_b_dec
            for name in ("b_enc", "W_dec", "b_dec"):
                assert torch.equal(getattr(parameters, name), getattr(before, name))
        if train == "decoder":  # b_dec is folded out, so that the encoder stays what it was
            z, same = parameters.pre_activations(held_out), before.pre_activations(held_out)
            torch.testing.assert_close(z, same, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_error_of_unlike_latents() -> None:
    before, x, held_out = untrained(), activations(3, 20_011), activations(4)
    offset = torch.linspace(-1.5, 1.5, before.d_sae) / before.W_dec.norm(dim=1)
    before = dataclasses.replace(before, b_enc=offset)
    error = {}
    for steps in (0, 150):
        point = loaded(refit(before, 9, x, RefitSettings(steps=steps, batch_tokens=1009)))
        error[steps] = float((point(held_out) - held_out).square().sum())
    assert error[150] < 0.9 * error[0]


def test_bad_requests_are_refused() -> None:
    parameters, x = Parameters.of(tiny_sae()), activations(3)
    for targets, said in (([], "no target L0s"), ([5, 5], "twice"), ([-1], "more than 0")):
        with pytest.raises(ValueError, match=said):
            list(refit_to_each(parameters, targets, x, RefitSettings()))
    with pytest.raises(ValueError, match="one batch takes 9000"):
        refit(parameters, 5, x, RefitSettings(batch_tokens=9000))
    with pytest.raises(ValueError, match="must be one of thresholds, decoder, all"):
        RefitSettings(train="encoder")
    with pytest.raises(ValueError, match="steps"):
        RefitSettings(steps=-1)
    with pytest.raises(ValueError, match="10,x"):
        numbers("--l0", "10,x")
    assert numbers("--l0", "10, 20.5") == (10, 20.5)
