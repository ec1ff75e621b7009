"""Configs, activations and parameters that cannot be trained are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from tests.control.small_training import BATCH, D_IN, D_SAE, data, good_config, train


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
        ("target_l0", "3"),
        ("target_l0", [3]),
        ("l0_coefficient", "3"),
        ("jumprelu_bandwidth", True),
        ("jumprelu_ste_to_input", "no"),
        ("jumprelu_ste_input_share", 0.0),
        ("jumprelu_ste_input_share", 1.7),
        ("jumprelu_ste_input_share", math.nan),
        ("jumprelu_ste_input_share", "half"),
        ("max_latent_density", "6 %"),
        ("matryoshka_widths", 5),
        ("matryoshka_loss_weight", {}),
        ("outlier_norm_ratio", [10]),
        ("l0_warm_up_steps", "100"),
        ("l0_warm_up_steps", -5),
        ("target_l0_warm_up_steps", 0.5),
        ("d_in", 0),
        ("d_sae", 13.5),
        ("decoder_init_norm", -1.0),
        ("decoder_init_norm", 0.5),
        ("jumprelu_tanh_scale", 0.0),
        ("pre_act_loss_coefficient", -1.0),
        ("reshape_activations", "hookz"),
    ],
)
def test_a_bad_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        JumpReLUTrainingSAE(good_config(**{field: value}))
    assert field in str(refusal.value)
    assert str(value) in str(refusal.value)


def test_fields_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="jumprelu_ste_input_share is 0.5.*to_input is False"):
        JumpReLUTrainingSAE(good_config(jumprelu_ste_to_input=False, jumprelu_ste_input_share=0.5))
    with pytest.raises(ValueError, match="aux_loss_coefficient.*layer_norm"):
        JumpReLUTrainingSAE(
            good_config(aux_loss_coefficient=0.1, normalize_activations="layer_norm")
        )
    with pytest.raises(ValueError, match="initialization.*jumprelu_init_threshold"):
        JumpReLUTrainingSAE(good_config(initialization="anthropic"))


def test_a_config_without_target_or_coefficient_says_which_to_give() -> None:
    with pytest.raises(ValueError, match=r"target_l0=40.*l0_coefficient"):
        JumpReLUTrainingSAE(good_config(target_l0=None))


@pytest.mark.parametrize("mode", ["step", "tanh"])
def test_a_target_beside_a_fixed_coefficient_is_refused_where_nothing_reads_it(mode: Any) -> None:
    both = {"target_l0": 5, "l0_coefficient": 0.3, "jumprelu_tanh_scale": 4.0}
    said = r"target_l0 is 5 and l0_coefficient is fixed at 0\.3.*--l0_coefficient None"
    with pytest.raises(ValueError, match=said):
        JumpReLUTrainingSAE(good_config(jumprelu_sparsity_loss_mode=mode, **both))
    JumpReLUTrainingSAE(good_config(jumprelu_sparsity_loss_mode="quadratic", **both))
    alone = {**both, "target_l0": None}
    JumpReLUTrainingSAE(good_config(jumprelu_sparsity_loss_mode=mode, **alone))


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
