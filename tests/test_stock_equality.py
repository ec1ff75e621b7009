"""With a stock config, this package trains as SAELens does: same loss, same gradients, same run.

SAELens' own class is the oracle throughout, except where it is wrong: under bfloat16 its threshold
gradient at small bandwidths is noise, and there the oracle is its own float32 step.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

D_IN, D_SAE, BATCH = 23, 101, 37
StockConfig = sae_lens.JumpReLUTrainingSAEConfig


def stock_config(**fields: Any) -> StockConfig:
    defaults = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "jumprelu_init_threshold": 0.31,
        "jumprelu_bandwidth": 0.43,
        "l0_coefficient": 0.7,
        "target_l0": 7.0,
    }
    return StockConfig(**{**defaults, **fields})


def twins(cfg: StockConfig, path: str) -> tuple[StockSAE, JumpReLUTrainingSAE]:
    """SAELens' SAE and ours with the same random parameters, all latents different."""
    stock = StockSAE(cfg)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        stock.threshold.abs_()
    ours = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig.from_dict({**cfg.to_dict(), "step_kernel": path})
    )
    ours.load_state_dict(stock.state_dict())
    return stock.train(), ours.train()


def step(
    sae: Any, x: Tensor, dead: Tensor | None = None, autocast: bool = False
) -> TrainStepOutput:
    """Forward and backward as SAELens' trainer calls them: only the forward under autocast."""
    sae.zero_grad()
    step_input = TrainStepInput(
        sae_in=x,
        coefficients={"l0": 0.7},
        dead_neuron_mask=dead,
        n_training_steps=3,
        is_logging_step=False,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(step_input=step_input)
    output.loss.backward()
    return output


def gradients(sae: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in sae.named_parameters()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
@pytest.mark.parametrize("pre_act", [None, 0.37])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
def test_loss_and_gradients_of_one_step(
    mode: str,
    to_input: bool,
    apply_b_dec: bool,
    pre_act: float | None,
    normalisation: str,
    path: str,
) -> None:
    cfg = stock_config(
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_ste_to_input=to_input,
        apply_b_dec_to_input=apply_b_dec,
        pre_act_loss_coefficient=pre_act,
        normalize_activations=normalisation,
    )
    stock, ours = twins(cfg, path)
    x = 0.4 + 1.7 * torch.randn(BATCH, D_IN)
    dead = torch.rand(D_SAE) < 0.3
    expected, found = step(stock, x, dead), step(ours, x, dead)

    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert found.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert float(found.losses[name]) == pytest.approx(float(loss), rel=2e-6), name
    of_stock, of_ours = gradients(stock), gradients(ours)
    assert of_ours.keys() == of_stock.keys()
    for name, gradient in of_stock.items():
        assert gradient.abs().max() > 0
        assert relative_error(of_ours[name], gradient) < 1e-5, name

    acts = found.feature_acts.to_dense()
    assert torch.equal(acts > 0, expected.feature_acts > 0)
    assert relative_error(acts, expected.feature_acts) < 1e-6
    assert relative_error(found.sae_out.detach(), expected.sae_out.detach()) < 1e-6
    assert (found.feature_acts.is_sparse) == (path == "sparse")


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_no_dead_latents_means_no_pre_activation_loss(path: str) -> None:
    stock, ours = twins(stock_config(pre_act_loss_coefficient=0.37), path)
    x = torch.randn(BATCH, D_IN)
    for dead in (None, torch.zeros(D_SAE, dtype=torch.bool)):
        expected, found = step(stock, x, dead), step(ours, x, dead)
        assert float(expected.losses["pre_act_loss"]) == 0 == float(found.losses["pre_act_loss"])
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_float64_weights(path: str) -> None:
    stock, ours = twins(stock_config(dtype="float64", pre_act_loss_coefficient=0.37), path)
    x, dead = torch.randn(BATCH, D_IN, dtype=torch.float64), torch.rand(D_SAE) < 0.3
    expected, found = step(stock, x, dead), step(ours, x, dead)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for name, gradient in gradients(stock).items():
        # The threshold and its gradient are float32 in both.
        tolerance = 1e-6 if name == "threshold" else 1e-12
        assert relative_error(gradients(ours)[name], gradient) < tolerance, name


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_user_hooks_see_what_stock_hooks_see(path: str) -> None:
    stock, ours = twins(stock_config(), path)
    x = torch.randn(BATCH, D_IN)
    seen: dict[str, dict[str, Tensor]] = {}
    for key, sae in (("stock", stock), ("ours", ours)):
        seen[key] = {}
        for name in ("sae_input", "sae_acts_pre", "sae_acts_post", "sae_recons"):
            point = getattr(sae, f"hook_{name}")
            point.add_hook(lambda v, hook, n=name, k=key: seen[k].update({n: v.detach().clone()}))
        step(sae, x, None)
    assert seen["ours"].keys() == seen["stock"].keys()
    for name, value in seen["stock"].items():
        assert relative_error(seen["ours"][name], value) < 1e-6, name


def test_evaluation_mode_encodes_and_reconstructs_as_stock() -> None:
    stock, ours = twins(stock_config(), "auto")
    x = torch.randn(BATCH, D_IN)
    stock.eval(), ours.eval()
    assert torch.equal(ours.encode(x) > 0, stock.encode(x) > 0)
    assert relative_error(ours(x).detach(), stock(x).detach()) < 1e-6


# ---------------------------------------------------------------- a whole run

STEPS = 7
LEARNING_RATE = 3e-3


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    mixing = torch.randn(D_IN, D_IN, generator=g)
    return [torch.randn(BATCH, D_IN, generator=g) @ mixing / 3 for _ in range(STEPS)]


def train(
    sae: Any, dtype: torch.dtype = torch.float32, autocast: bool = False
) -> SAETrainer[Any, Any]:
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
            lr_warm_up_steps=3,
            dead_feature_window=1,
            autocast=autocast,
            n_batches_for_norm_estimate=STEPS,
        ),
        sae=sae,
        data_provider=cycle([batch.to(dtype) for batch in batches()]),
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("path", ["dense", "sparse", "auto"])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
@pytest.mark.parametrize("normalisation", ["none", "expected_average_only_in"])
def test_a_run_of_the_trainer(mode: str, normalisation: str, path: str) -> None:
    cfg = stock_config(
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_ste_to_input=True,
        pre_act_loss_coefficient=0.03,
        l0_warm_up_steps=4,
        jumprelu_init_threshold=0.9,
        normalize_activations=normalisation,
    )
    stock, ours = twins(cfg, path)
    exact = StockSAE(stock_config(**{**vars(cfg), "dtype": "float64"}))
    exact.load_state_dict(stock.state_dict())
    start = {name: p.detach().clone() for name, p in stock.named_parameters()}

    of_exact = train(exact, torch.float64)
    of_stock, of_ours = train(stock), train(ours)

    # Adam divides a gradient by its own size, so rounding in a near-zero gradient moves a parameter
    # by a visible part of the learning rate, in SAELens' own run too: the run in float64 is the
    # truth, and ours may be off twice as far as SAELens' float32 run is.
    for (name, truth), plain, fast in zip(
        exact.named_parameters(), stock.parameters(), ours.parameters(), strict=True
    ):
        error = (fast.double() - truth).norm()
        allowed = 2 * (plain.double() - truth).norm()
        assert error <= allowed + torch.finfo(torch.float32).eps * truth.norm(), name
        # And the run went somewhere: the error is small beside the way.
        assert error < 1e-2 * (plain - start[name]).norm(), name

    assert torch.equal(of_ours.act_freq_scores, of_stock.act_freq_scores)
    assert torch.equal(of_ours.n_forward_passes_since_fired, of_stock.n_forward_passes_since_fired)
    assert of_ours.n_frac_active_samples == of_stock.n_frac_active_samples
    assert 0 < of_stock.dead_neurons.sum() < D_SAE  # the pre-activation loss had work
    assert of_exact.n_training_steps == STEPS


# ---------------------------------------------------------------- half precision


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
