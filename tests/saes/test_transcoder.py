"""The transcoder's step: gradients in closed form, and its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from tests.saes.transcoders import BATCH, D_IN, D_OUT, D_SAE, batches, make


def closed_form(
    sae: Any, x: Tensor, y: Tensor, lam: float, to_input: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of ‖ŷ - y‖² + λL0 with the paper's estimators, written out, in float64."""
    W_enc, b_enc, W_dec, b_dec, theta = (
        getattr(sae, name).detach().double()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    x, y, eps, n = x.double(), y.double(), sae.bandwidth, len(x)
    z = x @ W_enc + b_enc
    gate = (z > theta).double()
    window = (((z - theta) / eps).abs() < 0.5).double()
    a = z * gate
    y_hat = a @ W_dec + b_dec
    if hasattr(sae, "W_skip"):
        y_hat = y_hat + x @ sae.W_skip.detach().double().T
    e = 2 * (y_hat - y) / n
    to_a = e @ W_dec.T
    jump = window * (theta * to_a + lam / n) / eps
    to_z = gate * to_a + to_input * jump
    gradients = {
        "W_enc": x.T @ to_z,
        "b_enc": to_z.sum(0),
        "W_dec": a.T @ e,
        "b_dec": e.sum(0),
        "threshold": -jump.sum(0),
        "W_skip": e.T @ x,
    }
    return (y_hat - y).square().sum(1).mean() + lam * gate.sum(1).mean(), gradients


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("to_input", [0.0, 0.61, 1.0])
@pytest.mark.parametrize("path", ["dense", "sparse", "screened"])
def test_gradients_are_the_closed_form(skip: bool, to_input: float, path: str) -> None:
    sae = make(
        skip,
        l0_coefficient=0.37,
        jumprelu_bandwidth=0.83,
        jumprelu_init_threshold=0.6,
        jumprelu_ste_to_input=to_input > 0,
        jumprelu_ste_input_share=to_input or None,
        step_kernel=path,
        unit_norm_decoder=False,
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    rows = batches(1)[0]
    output = sae.training_forward_pass(
        TrainStepInput(rows, {"l0": 0.37}, None, n_training_steps=0, is_logging_step=False)
    )
    output.loss.backward()
    loss, gradients = closed_form(sae, rows[:, :D_IN], rows[:, D_IN:], 0.37, to_input)
    torch.testing.assert_close(output.loss.detach().double(), loss, rtol=1e-5, atol=0)
    named = dict(sae.named_parameters())
    assert ("W_skip" in named) == skip
    for name, parameter in named.items():
        expected = gradients[name]
        assert parameter.grad is not None and expected.abs().max() > 0
        error = (parameter.grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name
    # What the trainer's metrics compare the output with is the target.
    assert torch.equal(output.sae_in, rows[:, D_IN:])
    assert output.sae_out.shape == (BATCH, D_OUT)


def test_rows_of_one_hook_are_refused() -> None:
    sae = make(False)
    with pytest.raises(ValueError, match=r"19 \+ 23 = 42 wide, and got rows 19.*JumpReLUTraining"):
        sae.training_forward_pass(
            TrainStepInput(batches(1)[0][:, :D_IN], {"l0": 1.0}, None, 0, False)
        )


def test_a_nan_in_the_target_is_reported() -> None:
    rows = batches(1)[0]
    rows[3, -1] = torch.nan
    sae = make(False, l0_coefficient=1.0, jumprelu_bandwidth=0.8, jumprelu_init_threshold=0.6)
    with pytest.raises(ValueError, match="NaN"):
        sae.training_forward_pass(TrainStepInput(rows, {"l0": 1.0}, None, 0, False))


def test_training_starts_at_the_mean_and_aims_the_decoder() -> None:
    sae = make(False, normalize_activations="none", step_kernel="dense")
    rows = batches(1)[0]
    before = sae.W_dec.detach().clone()
    sae.training_forward_pass(TrainStepInput(rows, {"l0": 1.0}, None, 0, False))
    x, y = rows[:, :D_IN], rows[:, D_IN:]
    torch.testing.assert_close(sae.b_dec.detach(), y.mean(0))
    z = x @ sae.W_enc.detach()
    # A threshold is a sample's own value, and rounding decides about that one: leave it out.
    f = (z * (z > sae.threshold * (1 + 1e-5))).detach()
    expected = f.T @ (y - y.mean(0))
    fires = expected.norm(dim=1) > 0
    assert fires.sum() > D_SAE / 2
    torch.testing.assert_close(
        sae.W_dec.detach()[fires],
        torch.nn.functional.normalize(expected[fires], dim=1),
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.equal(sae.W_dec.detach()[~fires], before[~fires])
    assert sae.bandwidth == pytest.approx(2 * z.std().item(), rel=1e-5)
