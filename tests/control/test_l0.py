"""The L0 controller: shifts, targets, the multiplier, and a training that reaches its target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.l0 import L0Controller


class GaussianLayer:
    """Pre-activations of d_sae independent Gaussians, whose L0 and slopes are known exactly.

    L0(s) = Σ_i Q((θ_i + s - μ_i)/σ_i); the loss without its penalty is given a slope that says what
    an active latent is worth, so that the multiplier is known too.
    """

    def __init__(self, seed: int, d_sae: int = 211):
        random = np.random.default_rng(seed)
        self.mean, self.std = random.normal(size=d_sae), random.uniform(0.5, 2.0, d_sae)
        self.threshold = random.uniform(0.0, 3.0, d_sae)
        self.random = random

    def l0(self) -> float:
        distance = (self.threshold - self.mean) / self.std
        return float(sum(0.5 * math.erfc(u / math.sqrt(2)) for u in distance))

    def slope(self) -> float:
        distance = (self.threshold - self.mean) / self.std
        return -float((np.exp(-0.5 * distance**2) / (self.std * math.sqrt(2 * math.pi))).sum())


@pytest.mark.parametrize("target", [2.3, 23.0, 130.0])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("pull", [0.0, -0.01, 0.01])
def test_thresholds_are_shifted_to_the_target(target: float, noise: float, pull: float) -> None:
    """Also while training pulls every threshold down or up at each step."""
    layer = GaussianLayer(seed=3)
    controller = L0Controller(target)
    seen = []
    for _ in range(400):
        measured = layer.l0() * (1 + noise * layer.random.normal())
        shift = controller.shift(measured, torch.tensor(layer.slope()), bandwidth=1.3)
        assert abs(shift) <= controller.gain * 1.3 / 2 + 1e-6
        layer.threshold += float(shift) + pull
        seen.append(layer.l0())
    assert abs(np.mean(seen[-200:]) - target) < 0.01 * target


def test_an_empty_window_shifts_as_far_as_the_estimate_reaches() -> None:
    nothing = torch.tensor(0.0)
    for l0, direction in ((19.0, 1), (0.0, -1), (7.0, 0)):
        controller = L0Controller(7.0)
        furthest = direction * controller.gain * 0.4
        assert float(controller.shift(l0, nothing, 0.8)) == pytest.approx(furthest)


def test_the_target_warms_up_geometrically() -> None:
    controller = L0Controller(10.0, start_ratio=4.0, warm_up_steps=20)
    aims = []
    for _ in range(30):
        aims.append(controller.current_target())
        controller.shift(controller.current_target(), torch.tensor(-1.0), 0.5)
    assert aims[0] == pytest.approx(40.0) and aims[10] == pytest.approx(20.0)
    assert aims[20:] == [10.0] * 10


def test_the_coefficient_becomes_the_multiplier() -> None:
    """The price at which shifting every threshold together changes nothing to first order."""
    controller = L0Controller(7.0)
    worth, random = 0.37, np.random.default_rng(5)
    assert controller.coefficient == 0.0
    controller.update_multiplier(torch.tensor(0.0), torch.tensor(0.0))
    assert controller.coefficient == 0.0  # an empty window measures nothing
    for step in range(300):
        penalty = -random.uniform(3.0, 30.0)
        others = -worth * penalty * (1 + 0.3 * random.normal())
        controller.update_multiplier(torch.tensor(others), torch.tensor(penalty))
        if step == 0:  # the first measurement counts in full
            assert float(controller.coefficient) == pytest.approx(-others / penalty, rel=1e-6)
    assert float(controller.coefficient) == pytest.approx(worth, rel=0.15)
    for _ in range(300):  # latents that only harm are worth nothing, not less
        controller.update_multiplier(torch.tensor(-2.0), torch.tensor(-1.0))
    assert float(controller.coefficient) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_batch_owns_the_multiplier(sign: float) -> None:
    """One batch in eleven measures a thousand times the usual, as a massive token would."""
    multiplier, random = 0.37, np.random.default_rng(7)
    controller, lowest, highest = L0Controller(7.0), math.inf, 0.0
    for step in range(500):
        penalty = -random.uniform(3.0, 30.0)
        measured = multiplier * (1 + 0.3 * random.normal())
        if step % 11 == 5:
            measured = sign * 1000 * multiplier
        controller.update_multiplier(torch.tensor(-measured * penalty), torch.tensor(penalty))
        if step > 100:
            lowest = min(lowest, float(controller.coefficient))
            highest = max(highest, float(controller.coefficient))
    assert 0.25 * multiplier < lowest and highest < 2.5 * multiplier
    share = float(controller.unmeasured)
    assert (share < 0.01) if sign > 0 else (0.03 < share < 0.3)


def test_controller_continues_from_its_state() -> None:
    one, other = (L0Controller(40.0, start_ratio=2.0, warm_up_steps=9) for _ in range(2))
    for l0, others in ((70.0, 3.1), (65.3, 2.9), (61.1, 2.2)):
        one.shift(l0, torch.tensor(-5.0), 0.7)
        one.update_multiplier(torch.tensor(others), torch.tensor(-5.0))
    other.load_state(one.state())
    for controller in (one, other):
        controller.update_multiplier(torch.tensor(1.7), torch.tensor(-4.1))
    assert one.state() == other.state()
    assert one.shift(51.0, torch.tensor(-5.0), 0.7) == other.shift(51.0, torch.tensor(-5.0), 0.7)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("sparse", "step"),
        ("dense", "tanh"),
        ("sparse", "quadratic"),
        # Twins of these: tests/step holds that both paths take the same step in every mode.
        pytest.param("dense", "step", marks=pytest.mark.slow),
        pytest.param("sparse", "tanh", marks=pytest.mark.slow),
        pytest.param("dense", "quadratic", marks=pytest.mark.slow),
    ],
)
def test_l0_controlled_training_reaches_its_target(mode: Any, path: Any) -> None:
    """In every mode, at a learning rate that alone would carry L0 away."""
    torch.manual_seed(3)
    directions = nn.functional.normalize(torch.randn(67, 19), dim=1)
    cfg = JumpReLUTrainingSAEConfig(
        d_in=19,
        d_sae=83,
        target_l0=5.0,
        jumprelu_sparsity_loss_mode=mode,
        step_kernel=path,
    )

    def batches():
        while True:
            yield ((torch.rand(1021, 67) < 0.06) * (1 + torch.rand(1021, 67))) @ directions

    sae = JumpReLUTrainingSAE(cfg)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=250 * 1021,
            train_batch_size_samples=1021,
            lr=1e-2,
            lr_end=0.0,
            lr_decay_steps=50,
            n_batches_for_norm_estimate=5,
        ),
        sae=sae,
        data_provider=batches(),
    )
    trainer.fit()
    with torch.no_grad():
        x = torch.cat([next(batches()) for _ in range(8)])
        l0 = float((sae.eval().encode(x) > 0).float().sum(1).mean())
    assert l0 == pytest.approx(5.0, rel=0.03)
    assert sae.control.l0 is not None and float(sae.control.l0.coefficient) > 0


@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("parameter", ["raw", "log"])
@pytest.mark.parametrize("unit", ["sqrt_d", "unit_rms"])
def test_the_measured_coefficient_stops_a_common_shift(
    mode: Any, parameter: Any, unit: Any
) -> None:
    """Autograd of the whole loss, at the λ that was measured: Σ_i ∂L/∂θ_i is 0. Dense and sparse
    paths measure the same, and measuring changes no gradient."""
    torch.manual_seed(11)
    # Nearly orthogonal latents: an active one is worth something before any training.
    x = torch.randn(61, 41)
    cfg = dict(
        d_in=41,
        d_sae=43,
        target_l0=3.0,
        jumprelu_sparsity_loss_mode=mode,
        log_threshold=parameter == "log",
        hyperparameter_units=unit,
        normalize_activations="none",
        resample_dead_latents=False,
    )
    found = []
    for path in ("dense", "sparse"):
        torch.manual_seed(2)
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(step_kernel=path, **cfg))
        assert sae.control.l0 is not None
        sae.train()

        def gradients(scheduled: Any = 1.0, sae: JumpReLUTrainingSAE = sae) -> dict[str, Tensor]:
            sae.zero_grad()
            step_input = TrainStepInput(
                sae_in=x,
                coefficients={"l0": scheduled},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
            sae.training_forward_pass(step_input).loss.backward()
            return {name: p.grad.clone() for name, p in sae.named_parameters()}  # type: ignore[union-attr]

        gradients()
        coefficient = sae.control.l0.coefficient.clone()
        controller, sae.control.l0.smoothing = sae.control.l0, 0.0  # λ stays where it is
        steered = gradients()
        stored_gradient = steered.get(
            "parametrizations.threshold.original", steered.get("threshold")
        )
        ones = torch.ones(43)  # ∂θ/∂stored, by which the stored gradient is divided
        if parameter == "log":
            ones = sae.threshold.detach()
        elif unit == "unit_rms":
            ones = torch.full((43,), sae.units.activation)
        total = float((stored_gradient / ones).sum())
        scale = float((stored_gradient / ones).abs().sum())
        assert abs(total) < 1e-4 * scale
        sae.control.l0 = None  # the same λ as a fixed coefficient
        for name, gradient in gradients(coefficient).items():
            torch.testing.assert_close(gradient, steered[name], rtol=1e-5, atol=1e-7)
        found.append(float(coefficient))
        assert controller.steps == 0  # the optimiser has not stepped
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 0
