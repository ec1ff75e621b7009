"""How much of the estimators' gradient the encoder receives where nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.dictionary_control import DictionaryControl
from jumprelu_plugin.transcoders.clt.config import CLTTrainingConfig

D_IN, D_SAE, BATCH, L0, COEFFICIENT = 19, 43, 53, 5.0, 0.37


def encoder_gradient(**fields: Any) -> Tensor:
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(D_IN, D_SAE, **fields))
    rows = 1.3 + 0.7 * torch.randn(BATCH, D_IN)
    for _ in range(2):  # the multiplier is 0 at the first step
        output = sae.training_forward_pass(
            TrainStepInput(rows, {"l0": fields.get("l0_coefficient", 1.0)}, None, 0, False)
        )
        sae.zero_grad()
        output.loss.backward()
    assert sae.W_enc.grad is not None
    return sae.W_enc.grad.clone()


def test_half_of_it_where_l0_is_controlled() -> None:
    none = encoder_gradient(target_l0=L0, jumprelu_ste_to_input=False)
    everything = encoder_gradient(target_l0=L0, jumprelu_ste_input_share=1.0)
    assert (everything - none).norm() > 0.1 * none.norm()
    torch.testing.assert_close(encoder_gradient(target_l0=L0), 0.5 * (none + everything))


def test_all_of_it_with_a_fixed_coefficient() -> None:
    fixed = {"l0_coefficient": COEFFICIENT}
    everything = encoder_gradient(**fixed, jumprelu_ste_input_share=1.0)
    assert torch.equal(encoder_gradient(**fixed), everything)


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"target_l0": L0}, 0.5),
        ({"l0_coefficient": COEFFICIENT}, 1.0),
        ({"target_l0": L0, "jumprelu_ste_input_share": 0.3}, 0.3),
        ({"target_l0": L0, "jumprelu_ste_to_input": False}, 0.0),
    ],
)
def test_of_a_cross_layer_transcoder_too(fields: dict[str, Any], share: float) -> None:
    assert CLTTrainingConfig(**fields).resolve(D_SAE).jumprelu_ste_input_share == share


def test_a_run_goes_on_with_the_share_it_began_with() -> None:
    def control(**fields: Any) -> DictionaryControl:
        return JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(D_IN, D_SAE, target_l0=L0, **fields)
        ).control

    state, tensors = control().state(), control().tensors()
    earlier = {name: value for name, value in state.items() if name != "ste_input_share"}
    for given, found, expected in [
        ({}, state, 0.5),
        ({}, earlier, 1.0),  # a version that sent all of it
        ({}, {**state, "ste_input_share": 0.3}, 0.3),
        ({"jumprelu_ste_input_share": 0.7}, earlier, 0.7),
        ({"jumprelu_ste_to_input": False}, state, 0.0),
    ]:
        resumed = control(**given)
        resumed.load_state(found, tensors)
        assert resumed.ste_input_share == expected
    with pytest.raises(ValueError, match="ste_input_share is 3.5"):
        control().load_state({**state, "ste_input_share": 3.5}, tensors)


def test_it_is_described_as_a_field_of_the_config() -> None:
    said = JumpReLUTrainingSAEConfig(d_in=13, d_sae=29, target_l0=3).resolve().described()
    assert said["jumprelu_ste_input_share"] == "0.5"
    assert not [name for name in said if "given" in name]
