"""SAEs trained again, partly frozen, copied by state dict, or in a loop that is not SAELens'."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE as StockTrainingSAE
from sae_lens import JumpReLUTrainingSAEConfig as StockConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from tests.control.small_training import data, train

D_IN, D_SAE, TARGET = 19, 53, 5


def controlled(**fields: Any) -> JumpReLUTrainingSAE:
    torch.manual_seed(4)
    config = JumpReLUTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, target_l0=TARGET, step_kernel="sparse", **fields
    )
    return JumpReLUTrainingSAE(config)


def rows() -> list[Tensor]:
    return [*data()] * 20


def loop(
    sae: JumpReLUTrainingSAE,
    batches: list[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: float = 1.0,
) -> list[float]:
    """A user's own loop; the measured coefficient of every step."""
    optimizer = optimizer or torch.optim.Adam([p for p in sae.parameters() if p.requires_grad])
    sae.train()
    coefficients: list[float] = []
    for batch in batches:
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch, coefficients={"l0": 1.0}, dead_neuron_mask=None, n_training_steps=0,
                is_logging_step=False,
            )
        )  # fmt: skip
        optimizer.zero_grad()
        (output.loss * loss_scale).backward()
        for parameter in sae.parameters():
            if parameter.grad is not None:
                parameter.grad /= loss_scale
        optimizer.step()
        coefficients.append(float(output.metrics["measured_l0_coefficient"]))
    return coefficients


def mean_l0(sae: JumpReLUTrainingSAE) -> float:
    with torch.no_grad():
        return float((sae.encode(torch.cat(data())) > 0).float().sum(1).mean())


def test_a_second_trainer_holds_what_the_first_one_held() -> None:
    """An SAE handed to a new run has a new optimizer, whose steps are the ones to control."""
    sae = controlled()
    train(sae, rows()[:60])
    assert sae.optimizer_hooks is not None
    first = sae.optimizer_hooks.optimizer
    loop(sae, rows())
    assert sae.optimizer_hooks.optimizer is not first
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    assert mean_l0(sae) == pytest.approx(TARGET, rel=0.2)


def test_with_a_frozen_decoder_l0_is_held() -> None:
    sae = controlled()
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.detach().clone()
    loop(sae, rows())
    # The first batch turns the rows an SAE starts from; after it they stay.
    assert torch.allclose(sae.W_dec.norm(dim=1), before.norm(dim=1), atol=1e-5)
    assert mean_l0(sae) == pytest.approx(TARGET, rel=0.2)


@pytest.mark.parametrize("scale", [1 / 7, 1024.0])
def test_a_scaled_loss_is_the_same_training(scale: float) -> None:
    """As gradient accumulation and float16's loss scaling do before `backward`."""
    plain, scaled = controlled(), controlled()
    expected = loop(plain, rows()[:40])
    found = loop(scaled, rows()[:40], loss_scale=scale)
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected[-1] != expected[0]


def test_rows_of_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 5, 19\]; expected \[batch, 19\]"):
        loop(controlled(), [torch.randn(3, 5, D_IN)])


def test_a_loss_that_no_step_would_call_is_refused() -> None:
    with pytest.raises(TypeError, match="Own overrides calculate_aux_loss, which no training step"):
        own = type("Own", (JumpReLUTrainingSAE,), {"calculate_aux_loss": lambda self, **_: {}})
        own(JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, target_l0=TARGET))


@pytest.mark.parametrize("prefix", ["", "sae."])
def test_a_state_dict_says_all_of_a_trained_sae(prefix: str) -> None:
    trained = controlled()
    loop(trained, rows()[:40])
    stock = StockTrainingSAE(StockConfig(d_in=D_IN, d_sae=D_SAE)).state_dict()
    state = nn.ModuleDict({"sae": trained}).state_dict() if prefix else trained.state_dict()
    assert set(state) == {prefix + name for name in stock}
    other = controlled()
    (nn.ModuleDict({"sae": other}) if prefix else other).load_state_dict(state)
    x = torch.cat(list(islice(data(), 2)))
    assert torch.allclose(other.encode(x), trained.encode(x), atol=1e-5)
    assert torch.allclose(other(x), trained(x), atol=1e-4)
    # What was loaded is not initialized by the first batch.
    before = {name: getattr(other, name).detach().clone() for name in stock}
    other.calibrate_if_needed(data()[0])
    for name, value in before.items():
        assert torch.allclose(getattr(other, name), value, atol=1e-5), name


@torch.no_grad()
def test_what_is_assigned_and_said_is_kept() -> None:
    sae, wanted = controlled(), torch.linspace(-1, 2, D_IN)
    sae.b_dec = wanted
    sae.has_loaded_weights = True
    rows = sae.W_dec.clone()
    sae.calibrate_if_needed(data()[0])
    torch.testing.assert_close(sae.b_dec, wanted)
    torch.testing.assert_close(sae.W_dec, rows)
    assert sae.bandwidth is not None
