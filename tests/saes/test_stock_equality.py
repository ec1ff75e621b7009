"""With a stock config the plugin gives stock SAELens' losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from torch import Tensor

from tests.saes.twins import (
    BATCH,
    D_IN,
    D_SAE,
    STEPS,
    relative_error,
    step,
    stock_config,
    train,
    twins,
)


def gradients(sae: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in sae.named_parameters()}


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
