"""What the first step shows, against closed forms, stock SAELens and real runs."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.health.findings import lost_share
from jumprelu_plugin.training.health.first_step import DOMINANCE, first_step, threshold_reach
from tests.training.known_directions import BATCH as TOKENS
from tests.training.known_directions import D_IN, tokens
from tests.training.known_directions import D_SAE as WIDTH

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")
NORMAL = NormalDist()


def gaussian(d_in: int = 31, rows: int = 2003) -> torch.Tensor:
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(11))


def gaussian_sae(**fields: Any) -> JumpReLUTrainingSAE:
    """Unit encoders, so that every pre-activation of `gaussian` is a standard normal number."""
    given = {"d_in": 31, "d_sae": 997, "unit_norm_decoder": True, "l0_coefficient": 0.1, **fields}
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**given))


def test_windows_and_l0_are_the_gaussians() -> None:
    theta, width, lr_total = 1.3, 0.21, 0.17
    sae = gaussian_sae(
        jumprelu_init_threshold=theta,
        jumprelu_bandwidth=width,
        target_l0=23.0,
        jumprelu_sparsity_loss_mode="quadratic",
    )
    found = first_step(sae, gaussian(), lr_total, steps=100)

    def active(t: float) -> float:
        return 997 * (1 - NORMAL.cdf(t))

    inside = NORMAL.cdf(theta + width / 2) - NORMAL.cdf(theta - width / 2)
    assert found.spread == pytest.approx(1.0, rel=0.02)
    assert found.occupancy == pytest.approx(inside, rel=0.03)
    assert found.median_occupancy == pytest.approx(inside, rel=0.05)
    assert found.entries == pytest.approx(active(theta - width / 2), rel=0.03)
    assert found.l0 == pytest.approx(active(theta), rel=0.03)
    assert found.most_l0 == pytest.approx(997 / 2, rel=0.02)
    low, high = found.l0_in_reach
    assert low == pytest.approx(active(theta + lr_total), rel=0.03)
    assert high == pytest.approx(active(theta - lr_total), rel=0.03)
    wanted = NORMAL.inv_cdf(1 - 23.0 / 997) - theta
    assert found.target_shift == pytest.approx(wanted, rel=0.02)
    assert found.variance == pytest.approx(31, rel=0.02)
    assert found.rounding == 0.0


def test_a_calibrated_start_is_on_target_and_the_sae_is_left_alone() -> None:
    sae = gaussian_sae(l0_coefficient=None, target_l0=19.0)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    found = first_step(sae, gaussian(), 0.1, steps=100)
    assert found.l0 == pytest.approx(19.0, rel=0.1)
    assert abs(found.target_shift or 0.0) < 0.05
    assert found.bandwidth == pytest.approx(1.0, rel=0.02)
    assert sae.bandwidth is None and sae.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_rounding_of_a_half_precision_sae_is_what_rounding_does() -> None:
    fields = {"jumprelu_init_threshold": 1.3, "jumprelu_bandwidth": 0.21}
    found = first_step(gaussian_sae(dtype="bfloat16", **fields), gaussian(), 0.1, 100)
    # Rounding to 8 bits: uniform within half a spacing of 2^(e-7); over a normal number's binades.
    x = gaussian()
    spacing = 2.0 ** (x.abs().log2().floor() - 7)
    expected = (spacing.square() / 12).mean().sqrt() * 31**0.5 * (1 / 31**0.5)
    assert found.rounding == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("coefficient", [1e-6, 0.02, 40.0])
def test_threshold_gradients_are_those_of_stock_saelens(coefficient: float) -> None:
    fields = {
        "d_in": 31,
        "d_sae": 127,
        "normalize_activations": "none",
        "jumprelu_init_threshold": 0.13,
        "jumprelu_bandwidth": 0.11,
        "l0_coefficient": coefficient,
    }
    stock = StockSAE(sae_lens.JumpReLUTrainingSAEConfig(**fields))  # type: ignore[arg-type]
    ours = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**fields, jumprelu_ste_to_input=False))
    ours.load_state_dict(stock.state_dict())
    rows = gaussian()
    pulls = {}
    for c in (0.0, 1.0):
        stock.zero_grad()
        stock.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=rows,
                dead_neuron_mask=None,
                coefficients={"l0": c},
                n_training_steps=0,
                is_logging_step=False,
            )
        ).loss.backward()
        assert stock.threshold.grad is not None
        pulls[c] = stock.threshold.grad.double()
    error, penalty = pulls[0.0], coefficient * (pulls[1.0] - pulls[0.0])
    found = first_step(ours, rows, 0.1, 100)
    assert found.tokens == len(rows)
    expected = [(a.abs() > DOMINANCE * b.abs()).float().mean() for a, b in
                ((penalty, error), (error, penalty))]  # fmt: skip
    assert found.penalty_dominates == pytest.approx(expected[0].item(), abs=0.02)
    assert found.error_dominates == pytest.approx(expected[1].item(), abs=0.02)
    assert (found.penalty_dominates == 1.0) == (coefficient == 40.0)
    assert (found.error_dominates or 0.0) > 0.9 or coefficient > 1e-6


STEPS, LR = 90, 1e-3


def stock_settings(parameter: str = "raw", **changes: Any) -> JumpReLUTrainingSAE:
    """SAELens' own numbers; its coefficient is 1."""
    stock = sae_lens.JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH)
    names = ("jumprelu_init_threshold", "jumprelu_bandwidth", "decoder_init_norm",
             "jumprelu_ste_to_input", "normalize_activations", "l0_coefficient")  # fmt: skip
    fields = {name: getattr(stock, name) for name in names} | changes
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(D_IN, WIDTH, log_threshold=parameter == "log", **fields)  # type: ignore[arg-type]
    )


def rise(sae: JumpReLUTrainingSAE) -> float:
    """How far the median threshold moves in a run by SAELens' own trainer."""
    start = sae.threshold.detach().clone()
    cfg = SAETrainerConfig(total_training_samples=STEPS * TOKENS, train_batch_size_samples=TOKENS,
                           lr=LR, lr_end=LR)  # fmt: skip
    SAETrainer(cfg, sae, data_provider=tokens(3)).fit()
    return (sae.threshold.detach() - start).median().item()


@pytest.mark.parametrize("parameter", ["raw", "log"])
def test_thresholds_move_as_far_as_predicted_in_a_run_of_stock_settings(parameter: str) -> None:
    sae = stock_settings(parameter)
    assert sae.bandwidth is not None
    reach = threshold_reach(sae, sae.threshold.median().item(), sae.bandwidth, STEPS * LR, STEPS)
    # Adam takes steps below lr while gradients shrink, as they do where the encoder grows.
    assert 0.6 * reach.up < rise(sae) < 1.02 * reach.up
    assert reach.shift == 0.0


def test_a_coefficient_that_dominates_the_error_is_saturated() -> None:
    """Tenfold changes the thresholds' way where it does not outweigh, and not where it does."""
    rows = next(tokens(3))
    ways = {}
    for coefficient in (0.001, 0.01, 1.0, 10.0):
        torch.manual_seed(0)
        sae = stock_settings(l0_coefficient=coefficient)
        found = first_step(sae, rows, STEPS * LR, STEPS)
        ways[coefficient] = rise(sae), found.penalty_dominates or 0.0
    assert ways[1.0][1] > 0.95 and ways[0.001][1] < 0.5
    assert ways[10.0][0] == pytest.approx(ways[1.0][0], rel=0.01)
    assert abs(ways[0.01][0] / ways[0.001][0] - 1) > 0.1


def test_bfloat16_loses_the_steps_that_are_below_half_its_spacing() -> None:
    weights = torch.tensor([0.031, 0.062, 0.26, -0.51, 1.1], dtype=torch.bfloat16)
    # Spacings 2^-13, 2^-12, 2^-9, 2^-8, 2^-7: a step of 1e-3 is half the spacing of 2^-9 or more.
    assert lost_share(weights, 1e-3) == pytest.approx(2 / 5)
    assert lost_share(weights.float(), 1e-3) == 0.0
