"""Decoder constraint, units, L0 control, the optimiser seam, calibration and config errors.

The units are checked against the paper's training written out in NumPy float64, in the paper's own
units; the controller on simulated plants; everything else against its definition.
"""

from __future__ import annotations

import gc
import math
import weakref
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn
from torch.nn import functional

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.calibration import calibrate
from jumprelu_plugin.control.decoder_norm import normalize_rows_, remove_parallel_gradient_
from jumprelu_plugin.control.l0 import L0Controller
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from jumprelu_plugin.control.resampling import (
    ENCODER_SHARE,
    THRESHOLD_SHARE,
    FiringRecord,
    draw,
    longest_patience,
    patience,
    resample_,
    resample_dead_,
    unexplained,
)
from jumprelu_plugin.control.units import LogParameter, ScaledParameter, stored, units_of

# ---------------------------------------------------------------- decoder rows


def test_parallel_gradient_is_removed_row_by_row() -> None:
    W = torch.randn(13, 7, dtype=torch.float64)
    W /= W.norm(dim=1, keepdim=True)
    gradient = torch.randn(13, 7, dtype=torch.float64)
    given = gradient.clone()
    remove_parallel_gradient_(gradient, W)
    for row in range(13):
        w, g = W[row].numpy(), given[row].numpy()
        expected = g - sum(g[k] * w[k] for k in range(7)) * w
        np.testing.assert_allclose(gradient[row].numpy(), expected, rtol=1e-13, atol=1e-14)
    assert (gradient * W).sum(1).abs().max() < 1e-14


def test_a_row_of_zeros_survives_normalisation() -> None:
    W = torch.randn(13, 7) * torch.logspace(-12, 12, 13).unsqueeze(1)
    W[5] = 0.0
    direction = W.double() / W.double().norm(dim=1, keepdim=True)
    normalize_rows_(W)
    assert torch.equal(W[5], torch.zeros(7))
    kept = torch.arange(13) != 5
    torch.testing.assert_close(W[kept].double(), direction[kept], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- units


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


D_IN, D_SAE, BATCH, STEPS = 19, 53, 61, 6
RATE, SPARSITY, WARM_UP, THETA, BANDWIDTH = 5e-3, 0.006, 3, 0.11, 0.07  # in the paper's units


def data() -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    mixing = torch.randn(D_IN, D_IN, generator=g)
    return [0.7 + torch.randn(BATCH, D_IN, generator=g) @ mixing for _ in range(STEPS)]


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


def train(sae: JumpReLUTrainingSAE, batches: list[Tensor]) -> list[float]:
    """Every step's loss; afterwards the SAE is folded, as SAELens' runner leaves it."""
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=len(batches) * BATCH,
            train_batch_size_samples=BATCH,
            lr=RATE,
            lr_end=RATE / 10,
            n_batches_for_norm_estimate=len(batches),
        ),
        sae=sae,
        data_provider=cycle(batches),
    )
    losses: list[float] = []
    take_step = trainer.step

    def recorded(batch: Tensor) -> Any:
        output = take_step(batch)
        losses.append(output.loss.item())
        return output

    trainer.step = recorded  # type: ignore[method-assign]
    trainer.fit()
    return losses


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


# ---------------------------------------------------------------- L0 control


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


def test_the_target_settles_geometrically() -> None:
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


@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_steered_training_lands_on_its_target(mode: Any, path: Any) -> None:
    """In every mode, at a learning rate that alone would carry L0 away."""
    torch.manual_seed(3)
    directions = nn.functional.normalize(torch.randn(67, 19), dim=1)
    cfg = JumpReLUTrainingSAEConfig(
        d_in=19,
        d_sae=83,
        target_l0=5.0,
        jumprelu_sparsity_loss_mode=mode,
        step_kernel=path,
        target_l0_warm_up_steps=60,
    )

    def batches():
        while True:
            yield ((torch.rand(2048, 67) < 0.06) * (1 + torch.rand(2048, 67))) @ directions

    sae = JumpReLUTrainingSAE(cfg)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=250 * 2048,
            train_batch_size_samples=2048,
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


# ---------------------------------------------------------------- dead latents


@pytest.mark.parametrize("parameter", ["raw", "log"])
def test_dead_latents_restart_from_residuals(parameter: Any) -> None:
    cfg = JumpReLUTrainingSAEConfig(
        d_in=19,
        d_sae=83,
        target_l0=5.0,
        hyperparameter_units="unit_rms",
        log_threshold=parameter == "log",
    )
    torch.manual_seed(7)
    sae = JumpReLUTrainingSAE(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sum(p.square().sum() + p.sum() for p in sae.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    dead = torch.zeros(83, dtype=torch.bool)
    dead[[3, 17, 80]] = True
    before = {n: getattr(sae, n).detach().clone() for n in ("W_enc", "W_dec", "threshold", "b_enc")}
    residual = torch.randn(11, 19)
    residual[4:] = 0.0  # tokens rebuilt without an error are never drawn
    latents, tokens = draw(dead, residual, sae.W_dec, seed=5)
    assert sorted(latents.tolist()) == [3, 17, 80]
    assert len(set(tokens.tolist())) == 3 and tokens.max() < 4
    center = torch.randn(19)
    resample_(sae, latents, residual[tokens], residual[tokens], center, ~dead, optimizer)
    living = before["W_enc"][:, ~dead].norm(dim=0).mean()
    for latent, token in zip(latents.tolist(), tokens.tolist(), strict=True):
        unit = residual[token] / residual[token].norm()
        torch.testing.assert_close(sae.W_enc[:, latent], ENCODER_SHARE * living * unit)
        torch.testing.assert_close(sae.W_dec[latent] / sae.W_dec[latent].norm(), unit)
        z = center @ sae.W_enc[:, latent] + sae.b_enc[latent]
        assert abs(float(z.detach())) < 1e-4
        median = before["threshold"][~dead].median()
        torch.testing.assert_close(sae.threshold[latent], THRESHOLD_SHARE * median)
    for name, value in before.items():
        axis = 1 if name == "W_enc" else 0
        kept = (~dead).nonzero().flatten()
        found = getattr(sae, name).detach()
        torch.testing.assert_close(found.index_select(axis, kept), value.index_select(axis, kept))
        first, second = (
            optimizer.state[stored(sae, name)][moment] for moment in ("exp_avg", "exp_avg_sq")
        )
        assert (first.index_select(axis, latents) == 0).all()
        assert (first.index_select(axis, kept) != 0).all()
        usual = second.index_select(axis, kept).mean()
        new = second.index_select(axis, latents)
        torch.testing.assert_close(new, usual.expand_as(new))


def test_nothing_is_restarted_without_dead_latents_or_errors() -> None:
    residual, W_dec = torch.randn(5, 7), torch.randn(11, 7)
    assert draw(torch.zeros(11, dtype=torch.bool), residual, W_dec, 1)[0].numel() == 0
    assert draw(torch.ones(11, dtype=torch.bool), torch.zeros(5, 7), W_dec, 1)[0].numel() == 0
    assert draw(torch.ones(11, dtype=torch.bool), residual, W_dec, 1)[0].numel() == 5


def test_what_a_living_latent_points_along_is_not_drawn_again() -> None:
    random = torch.Generator().manual_seed(3)
    W_dec = 3.7 * torch.randn(13, 31, generator=random)
    dead = torch.zeros(13, dtype=torch.bool)
    dead[[2, 11]] = True
    known = W_dec[[0, 5, 7, 12, 5, 4]] * torch.tensor([0.3, 1.1, 2.3, 0.7, 5.9, 1.3])[:, None]
    new = torch.randn(2, 31, generator=random)
    # Along a dead latent, and against a living one: neither is known.
    residual = torch.cat((known, new, W_dec[11:12], -W_dec[3:4]))
    left = unexplained(residual, W_dec, ~dead)
    cosines = functional.cosine_similarity(residual[:, None], W_dec[None, ~dead], dim=2)
    torch.testing.assert_close(left, 1 - cosines.clamp_min(0).amax(1).square(), atol=1e-5, rtol=0)
    residual *= (torch.tensor([7.0] * 6 + [5.0] * 4) / residual.norm(dim=1))[:, None]
    for seed in range(17):
        _, tokens = draw(dead, residual, W_dec, seed)
        assert tokens.min() >= 6, "a known direction was preferred to a new one"


def test_the_firing_record_counts_silence() -> None:
    record = FiringRecord(5)
    dense = torch.tensor([[0.0, 1.0, 0, 0, 0], [0, 0, 2.0, 0, 0]])
    record.update(dense)
    record.update(torch.tensor([[0.0, 3.0, 0, 0, 0]]).to_sparse())
    assert record.silent.tolist() == [2, 0, 1, 2, 2] and record.steps == 2
    assert record.lived.tolist() == [2] * 5


def test_a_latent_that_fired_for_long_may_be_silent_for_longer() -> None:
    record = FiringRecord(6)
    record.lived = torch.tensor([13, 60, 300, 300, 7000, 7000])
    record.silent = torch.tensor([13, 19, 29, 30, 67, 68])
    # 17 for the first two, a tenth of 300, and never more than four times 17.
    assert record.dead(17).tolist() == [False, True, False, True, False, True]


def test_patience_gives_rare_latents_more_time() -> None:
    assert patience(d_sae=16_384, target_l0=64.0, batch=4_096) == 12
    assert patience(d_sae=65_536, target_l0=16.0, batch=2_048) == 100
    assert longest_patience(d_sae=65_536, target_l0=16.0, batch=2_048) == 400


def test_restarted_latents_are_new_and_the_others_are_not() -> None:
    cfg = JumpReLUTrainingSAEConfig(d_in=19, d_sae=83, target_l0=5.0)
    torch.manual_seed(11)
    sae = JumpReLUTrainingSAE(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    record = FiringRecord(83)
    record.steps = 301
    record.lived += 300
    record.silent[[5, 71]] = torch.tensor([30, 31])
    record.silent[9] = 29
    x, residual = torch.randn(23, 19), torch.randn(23, 19)
    before = sae.W_dec.detach().clone()

    def aim(inputs: Any, left: Any, tokens: Any) -> Any:
        assert inputs is x and left is residual and len(tokens) == 2
        return left[tokens], torch.zeros(19)

    resample_dead_(sae, record, 17, x, residual, aim, optimizer, seed=3)
    moved = (sae.W_dec.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [5, 71] and record.checked == 301
    assert record.silent[[5, 9, 71]].tolist() == [0, 29, 0]
    assert record.lived[[5, 9, 71]].tolist() == [0, 300, 0]


def test_no_latent_restarts_once_the_learning_rate_is_low() -> None:
    record, weight = FiringRecord(5), torch.nn.Parameter(torch.zeros(3))
    for rate, may in ((1e-4, True), (3e-3, True), (3.1e-4, True), (2.9e-4, False), (3e-3, True)):
        assert record.may_resample(torch.optim.Adam([weight], lr=rate)) is may


# ---------------------------------------------------------------- the optimiser seam


def two_models() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(7, 5), nn.Linear(7, 5)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(11, 7, dtype=next(model.parameters()).dtype)).pow(2).sum().backward()
    optimizer.step()


def test_seam_finds_the_right_optimizer_and_brackets_its_steps() -> None:
    ours, other = two_models()
    events: list[str] = []
    seam = OptimizerHooks(
        ours.weight, before=lambda: events.append("before"), after=lambda: events.append("after")
    )
    for_ours = torch.optim.Adam(ours.parameters())
    for_other = torch.optim.Adam(other.parameters())
    take_step(other, for_other)
    assert events == [] and seam.optimizer is None
    take_step(ours, for_ours)
    assert seam.optimizer is for_ours
    assert events == ["before", "after"]
    take_step(other, for_other)
    take_step(ours, for_ours)
    assert events == ["before", "after"] * 2
    assert for_ours.param_groups[0]["fused"] is True
    assert not for_other.param_groups[0]["fused"]


def test_seam_sees_the_parameters_before_and_after_the_update() -> None:
    model = two_models()[0]
    seen: list[Tensor] = []
    note = lambda: seen.append(model.weight.detach().clone())  # noqa: E731
    seam = OptimizerHooks(model.weight, before=note, after=note)
    start = model.weight.detach().clone()
    take_step(model, torch.optim.Adam(model.parameters()))
    assert torch.equal(seen[0], start) and not torch.equal(seen[1], start)
    assert torch.equal(seen[1], model.weight)
    assert seam.optimizer is not None


def test_two_seams_wait_for_two_optimizers() -> None:
    """Two SAEs in one process may both be waiting when the first optimiser steps."""
    models = two_models()
    events: list[str] = []
    seams = [
        OptimizerHooks(
            model.weight,
            before=lambda n=name: events.append(f"before {n}"),
            after=lambda n=name: events.append(f"after {n}"),
        )
        for name, model in zip("ab", models, strict=True)
    ]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        take_step(model, optimizer)
    assert events == ["before a", "after a", "before b", "after b"]
    assert [seam.optimizer for seam in seams] == optimizers


def test_seam_lets_go_of_parameters_that_are_gone() -> None:
    ours, other = two_models()
    events: list[str] = []
    seam = OptimizerHooks(ours.weight, before=lambda: events.append("!"), after=lambda: None)
    del ours
    gc.collect()
    take_step(other, torch.optim.Adam(other.parameters()))
    take_step(other, torch.optim.Adam(other.parameters()))
    assert events == [] and seam.optimizer is None


def test_an_sae_that_is_never_stepped_can_be_freed() -> None:
    sae = JumpReLUTrainingSAE(good_config(l0_coefficient=0.1)).train()
    sae.training_forward_pass(
        step_input=TrainStepInput(
            sae_in=torch.randn(17, 7),
            coefficients={"l0": 0.1},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    gone = weakref.ref(sae)
    del sae
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("choice", [{"foreach": True}, {"foreach": False}, {"fused": False}])
def test_seam_respects_a_kernel_the_user_chose(choice: dict[str, bool]) -> None:
    model = two_models()[0]
    seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
    optimizer = torch.optim.Adam(model.parameters(), **choice)
    take_step(model, optimizer)
    assert seam.optimizer is optimizer
    assert not optimizer.param_groups[0]["fused"]


def test_seam_leaves_other_optimizers_alone() -> None:
    model = two_models()[0]
    seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take_step(model, optimizer)
    assert seam.optimizer is optimizer
    assert not optimizer.param_groups[0].get("fused")


@pytest.mark.parametrize("already", [0, 3])
def test_fused_update_is_the_plain_update(already: int) -> None:
    """Also when the switch comes late, as after resuming a run that began without it."""
    results = {}
    for kind in ("plain", "fused", "truth"):
        torch.manual_seed(3)
        model = two_models()[0]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if kind == "truth":
            model = model.double()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        batches = [torch.randn(11, 7) for _ in range(9)]
        for index, batch in enumerate(batches):
            if kind == "fused" and index == already:
                seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
            optimizer.zero_grad()
            model(batch.to(model.weight.dtype)).pow(2).sum().backward()
            optimizer.step()
        results[kind] = model.weight.detach().double()
        assert bool(optimizer.param_groups[0]["fused"]) == (kind == "fused")
        assert kind != "fused" or seam.optimizer is optimizer
    error = (results["fused"] - results["truth"]).abs().max()
    plain = (results["plain"] - results["truth"]).abs().max()
    floor = torch.finfo(torch.float32).eps * results["truth"].abs().max()
    assert error <= 2 * plain + floor


def by_column(model: nn.Linear) -> nn.Linear:
    model.weight.data = model.weight.data.t().contiguous().t()
    return model


def test_a_matrix_stored_by_column_gets_the_same_update_and_keeps_its_shape() -> None:
    found = []
    for layout in (lambda model: model, by_column):
        torch.manual_seed(3)
        model = layout(two_models()[0])
        strides = model.weight.stride()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
        for _ in range(4):
            take_step(model, optimizer)
        assert seam.optimizer is optimizer and model.weight.stride() == strides
        moments = [optimizer.state[model.weight][name] for name in ("exp_avg", "exp_avg_sq")]
        assert all(moment.shape == model.weight.shape for moment in moments)
        assert model.weight.grad is not None and model.weight.grad.shape == model.weight.shape
        # A checkpoint goes into any optimiser, and out of it.
        other = torch.optim.Adam(model.parameters(), lr=1e-2)
        other.load_state_dict(optimizer.state_dict())
        take_step(model, other)
        found.append([model.weight.detach().clone(), model.bias.detach(), *moments])
    for of_rows, of_columns in zip(*found, strict=True):
        torch.testing.assert_close(of_columns, of_rows, rtol=1e-6, atol=1e-7)


def test_an_interrupted_step_leaves_parameters_that_can_be_saved() -> None:
    model = by_column(two_models()[0])
    seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    take_step(model, optimizer)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        take_step(model, optimizer)
    handle.remove()
    seam.restore_layout()
    assert model.weight.shape == (5, 7)
    assert optimizer.state[model.weight]["exp_avg"].shape == (5, 7)
    take_step(model, optimizer)


# ---------------------------------------------------------------- calibration

ROWS, LATENTS = 509, 211


def pre_activations() -> Tensor:
    spread = torch.linspace(0.3, 2.9, LATENTS)
    return torch.randn(ROWS, LATENTS) * spread + torch.linspace(0.1, 0.4, LATENTS)


@pytest.mark.parametrize("asked", [7.0, 31.0, 83.0])
def test_calibration_gives_the_asked_l0(asked: float) -> None:
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


# ---------------------------------------------------------------- refusals


def good_config(**fields: Any) -> JumpReLUTrainingSAEConfig:
    return JumpReLUTrainingSAEConfig(**{"d_in": 7, "d_sae": 13, "target_l0": 3, **fields})


def test_the_good_config_is_good() -> None:
    JumpReLUTrainingSAE(good_config())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("jumprelu_init_threshold", -0.1),
        ("jumprelu_init_threshold", math.nan),
        ("jumprelu_bandwidth", 0.0),
        ("jumprelu_bandwidth", -2.5),
        ("jumprelu_bandwidth", math.nan),
        ("target_l0", 0.0),
        ("target_l0", -3.0),
        ("target_l0", 14),
        ("target_l0", math.nan),
        ("l0_coefficient", math.nan),
        ("density_penalty_scale", 0.0),
        ("density_penalty_scale", -0.01),
        ("density_penalty_scale", math.nan),
        ("matryoshka_widths", []),
        ("matryoshka_widths", [0, 5]),
        ("matryoshka_widths", [5, 5]),
        ("matryoshka_widths", [7, 14]),
        ("matryoshka_widths", [2.5]),
        ("aux_loss_coefficient", -0.1),
        ("aux_loss_coefficient", math.nan),
        ("pre_act_loss_latents", "living"),
        ("initialization", "random"),
        ("jumprelu_sparsity_loss_mode", "l1"),
        ("hyperparameter_units", "rms"),
        ("log_threshold", "exp"),
        ("unit_norm_decoder", "unit"),
        ("step_kernel", "fast"),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        JumpReLUTrainingSAE(good_config(**{field: value}))
    assert field in str(refusal.value)
    assert str(value) in str(refusal.value)


def test_fields_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="aux_loss_coefficient.*layer_norm"):
        JumpReLUTrainingSAE(
            good_config(aux_loss_coefficient=0.1, normalize_activations="layer_norm")
        )
    with pytest.raises(ValueError, match="initialization.*jumprelu_init_threshold"):
        JumpReLUTrainingSAE(good_config(initialization="anthropic"))


def test_a_config_without_target_or_coefficient_says_which_to_give() -> None:
    with pytest.raises(ValueError, match=r"target_l0=40.*l0_coefficient"):
        JumpReLUTrainingSAE(good_config(target_l0=None))


def test_quadratic_mode_needs_a_target() -> None:
    with pytest.raises(ValueError, match="target_l0 must be set for quadratic"):
        JumpReLUTrainingSAE(
            good_config(target_l0=None, l0_coefficient=0.3, jumprelu_sparsity_loss_mode="quadratic")
        )


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_refuses_activations_that_are_not_finite(first: bool, bad: float, path: str) -> None:
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, target_l0=5, normalize_activations="none", step_kernel=path
        )
    )
    sae.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    batches = data()
    batches[0 if first else 2][3, 4] = bad
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_mlp_out.*NaN or infinite"):
        train(sae, batches)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_step_refuses_parameters_that_are_not_finite(name: str, path: str) -> None:
    """Found within two steps: the value reaches the loss, or through Adam every parameter."""
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D_IN,
            d_sae=D_SAE,
            l0_coefficient=0.1,
            jumprelu_init_threshold=0.4,
            jumprelu_bandwidth=0.3,
            normalize_activations="none",
            step_kernel=path,
        )
    )
    with torch.no_grad():
        parameter = getattr(sae, name)
        parameter[(3,) * parameter.ndim] = math.nan
    with pytest.raises(ValueError, match="diverged"):
        train(sae, data())


def test_training_on_one_token_over_and_over_is_refused() -> None:
    sae = JumpReLUTrainingSAE(good_config(d_in=D_IN, normalize_activations="none"))
    with pytest.raises(ValueError, match="all the same"):
        train(sae, [torch.randn(1, D_IN).expand(BATCH, -1).clone()] * 3)


# ---------------------------------------------------------------- steering in the step


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

        def gradients(sae: JumpReLUTrainingSAE = sae) -> dict[str, Tensor]:
            sae.zero_grad()
            step_input = TrainStepInput(
                sae_in=x,
                coefficients={"l0": 1.0},
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
        sae.control.l0 = None
        used = coefficient * sae.units.loss
        sae._coefficient = lambda _, used=used: used  # type: ignore[method-assign, misc]
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, steered[name], rtol=1e-5, atol=1e-7)
        found.append(float(coefficient))
        assert controller.steps == 0  # the optimiser has not stepped
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 0
