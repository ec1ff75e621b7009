"""Units of the hyper-parameters, and training in the paper's units against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.units import LogParameter, ScaledParameter, units_of
from tests.control.small_training import (
    BANDWIDTH,
    D_IN,
    D_SAE,
    RATE,
    SPARSITY,
    THETA,
    WARM_UP,
    data,
    train,
)


def test_units_are_the_table() -> None:
    assert (units_of("sqrt_d", 23).activation, units_of("sqrt_d", 23).loss) == (1.0, 1.0)
    paper = units_of("unit_rms", 23)
    assert paper.activation == pytest.approx(math.sqrt(23)) and paper.loss == 23.0
    with pytest.raises(ValueError, match="'rms'.*sqrt_d, unit_rms"):
        units_of("rms", 23)


@pytest.mark.parametrize("parametrization", [ScaledParameter(4.8), LogParameter(4.8)])
def test_parametrizations_invert(parametrization: nn.Module) -> None:
    value = torch.rand(13, dtype=torch.float64) + 0.01
    stored = parametrization.right_inverse(value)  # type: ignore[operator]
    torch.testing.assert_close(parametrization(stored), value, rtol=1e-14, atol=0.0)
    log = isinstance(parametrization, LogParameter)
    expected = np.log(value.numpy() / 4.8) if log else value.numpy() / 4.8
    np.testing.assert_allclose(stored.numpy(), expected, rtol=1e-13)


def paper_sae(to_input: bool) -> JumpReLUTrainingSAE:
    torch.manual_seed(5)
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D_IN,
            d_sae=D_SAE,
            l0_coefficient=SPARSITY,
            l0_warm_up_steps=WARM_UP,
            jumprelu_init_threshold=THETA,
            jumprelu_bandwidth=BANDWIDTH,
            jumprelu_ste_to_input=to_input,
            hyperparameter_units="unit_rms",
            log_threshold=True,
            unit_norm_decoder=True,
        )
    )


@pytest.mark.parametrize("to_input", [False, True])
def test_training_does_not_depend_on_the_scale_of_the_data(to_input: bool) -> None:
    batches = data()
    one, other = paper_sae(to_input), paper_sae(to_input)
    scale = 4.7
    of_one, of_other = train(one, batches), train(other, [scale * b for b in batches])
    assert of_other == pytest.approx(of_one, rel=1e-4)
    x = batches[2]
    active = (one.encode(x) > 0).float().sum(1).mean()
    assert 2 < active < 40
    expected, found = one(x).detach(), other(scale * x).detach() / scale
    assert (found - expected).norm() < 1e-4 * expected.norm()


class PaperTraining:
    """'Jumping Ahead' (arXiv 2407.14435, section 3 and appendix) in NumPy, x scaled to E‖x‖ = 1.

    Loss ‖x - x̂‖² + λ‖f‖₀, θ = exp(ℓ), gradients by hand, the decoder's made tangential,
    all clipped to norm 1 as SAELens' trainer does, Adam (0.9, 0.999, 1e-8), unit rows.
    """

    def __init__(self, sae: JumpReLUTrainingSAE, to_input: bool):
        self.to_input = to_input
        self.p = {
            "W_enc": sae.W_enc.detach().double().numpy().copy(),
            "W_dec": sae.W_dec.detach().double().numpy().copy(),
            "b_enc": np.zeros(D_SAE),
            "b_dec": np.zeros(D_IN),
            "log_theta": np.full(D_SAE, math.log(THETA)),
        }
        self.m = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.p.items()}
        self.steps = 0

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        p = self.p
        centred = x - p["b_dec"]
        z = centred @ p["W_enc"] + p["b_enc"]
        theta = np.exp(p["log_theta"])
        gate = (z > theta).astype(float)
        return centred, z, theta, gate, (z * gate) @ p["W_dec"] + p["b_dec"]

    def step(self, x: np.ndarray) -> float:
        p, n = self.p, len(x)
        penalty = SPARSITY * min(1.0, self.steps / WARM_UP)
        centred, z, theta, gate, x_hat = self.forward(x)
        loss = ((x_hat - x) ** 2).sum(1).mean() + penalty * gate.sum(1).mean()

        to_x_hat = 2 * (x_hat - x) / n
        to_f = to_x_hat @ p["W_dec"].T
        kernel = (np.abs(z - theta) < BANDWIDTH / 2) / BANDWIDTH
        through_jump = (theta * to_f + penalty / n) * kernel  # against θ; along z, if it may
        to_z = gate * to_f + (through_jump if self.to_input else 0.0)
        to_W_dec = (z * gate).T @ to_x_hat
        to_W_dec -= (to_W_dec * p["W_dec"]).sum(1, keepdims=True) * p["W_dec"]
        gradient = {
            "W_enc": centred.T @ to_z,
            "W_dec": to_W_dec,
            "b_enc": to_z.sum(0),
            "b_dec": to_x_hat.sum(0) - (to_z @ p["W_enc"].T).sum(0),
            "log_theta": -through_jump.sum(0) * theta,
        }
        self.adam(gradient)
        p["W_dec"] /= np.linalg.norm(p["W_dec"], axis=1, keepdims=True)
        return float(loss)

    def adam(self, gradient: dict[str, np.ndarray]) -> None:
        self.steps += 1
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        clip = min(1.0, 1.0 / (norm + 1e-6))
        for name, g in gradient.items():
            g = g * clip
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g**2
            m = self.m[name] / (1 - 0.9**self.steps)
            v = self.v[name] / (1 - 0.999**self.steps)
            self.p[name] -= RATE * m / (np.sqrt(v) + 1e-8)


@pytest.mark.parametrize("to_input", [False, True])
def test_paper_units_train_as_the_paper_written_out(to_input: bool) -> None:
    sae = paper_sae(to_input)
    paper = PaperTraining(sae, to_input)
    start = paper.p["W_dec"].copy()
    batches = data()
    norm = float(np.mean([b.double().norm(dim=1).mean() for b in batches]))

    expected = [paper.step(b.double().numpy() / norm) for b in batches]
    assert train(sae, batches) == pytest.approx(expected, rel=1e-5)

    x = batches[2]
    x_hat = paper.forward(x.double().numpy() / norm)[-1] * norm
    found = sae(x).detach().double().numpy()
    assert np.linalg.norm(found - x_hat) < 1e-4 * np.linalg.norm(x_hat)
    # θ is untouched by folding: still in SAELens' units, √d_in times the paper's.
    theta = sae.threshold.detach().double().numpy() / math.sqrt(D_IN)
    np.testing.assert_allclose(theta, np.exp(paper.p["log_theta"]), rtol=1e-5)
    assert np.ptp(theta) > 0.01 * THETA  # it was trained
    assert np.linalg.norm(paper.p["W_dec"] - start) > 0.1
    # Folding divided the decoder by the input scale, so its rows are the data's norm over √d_in.
    rows = sae.W_dec.detach().double().norm(dim=1).numpy()
    np.testing.assert_allclose(rows, norm / math.sqrt(D_IN), rtol=1e-5)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_decoder_rows_keep_unit_norm_while_training(path: str) -> None:
    cfg = JumpReLUTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, target_l0=5, normalize_activations="none", step_kernel=path
    )
    sae = JumpReLUTrainingSAE(cfg)
    before = sae.W_dec.detach().clone()
    train(sae, data())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)
    assert (sae.W_dec - before).norm() > 0.1


def test_sqrt_d_and_unit_rms_name_the_same_start() -> None:
    """θ, ε and λ of one training, given in either units, are the same numbers inside."""
    root = math.sqrt(D_IN)
    common = {"d_in": D_IN, "d_sae": D_SAE}
    paper = JumpReLUTrainingSAEConfig(
        **common,
        hyperparameter_units="unit_rms",
        l0_coefficient=SPARSITY,
        jumprelu_init_threshold=THETA,
        jumprelu_bandwidth=BANDWIDTH,
    )
    saelens = JumpReLUTrainingSAEConfig(
        **common,
        l0_coefficient=SPARSITY * D_IN,
        jumprelu_init_threshold=THETA * root,
        jumprelu_bandwidth=BANDWIDTH * root,
    )
    one, other = JumpReLUTrainingSAE(paper), JumpReLUTrainingSAE(saelens)
    torch.testing.assert_close(one.threshold, other.threshold, rtol=1e-6, atol=0.0)
    assert one.bandwidth == pytest.approx(other.bandwidth)
    # What the config says is what is recorded, in the units it was given in.
    assert one.cfg.to_dict()["jumprelu_init_threshold"] == THETA
    details = one.cfg.metadata.training_architecture_details
    assert details["jumprelu_init_threshold"] == THETA
