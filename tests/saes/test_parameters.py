"""Folding keeps the function; the function is SAELens' own; broken parameters are refused."""

from typing import Any

import pytest
import torch

from jumprelu_plugin.saes.parameters import PairScale, Parameters, dead_parameters
from tests.dictionaries import D_IN, D_OUT, D_SAE, random_sae, random_transcoder

INPUTS = 2.0 * torch.randn(101, D_IN, generator=torch.Generator().manual_seed(11))


def outputs(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
    return parameters.decode(parameters.encode(x), x)


@pytest.mark.parametrize(
    "sae",
    [
        random_sae(),
        random_sae(subtract=False),
        random_transcoder(d_out=D_OUT),
        random_transcoder(skip=True, d_out=D_OUT),
    ],
    ids=["sae", "sae without b_dec", "transcoder", "skip"],
)
def test_function_is_saelens_own(sae) -> None:
    parameters = Parameters.of(sae)
    assert torch.allclose(parameters.encode(INPUTS), sae.encode(INPUTS), atol=1e-5)
    assert torch.allclose(outputs(parameters, INPUTS), sae(INPUTS), atol=1e-5)
    assert (parameters.encode(INPUTS) > 0).float().mean() > 0.05


def test_fold_b_dec_keeps_the_function() -> None:
    parameters = Parameters.of(random_sae()).to(torch.float64)
    folded = parameters.fold_b_dec()
    assert not folded.subtracts_b_dec
    assert not torch.allclose(folded.b_enc, parameters.b_enc)
    x = INPUTS.double()
    torch.testing.assert_close(outputs(folded, x), outputs(parameters, x), rtol=1e-10, atol=1e-10)


def test_fold_decoder_norms_agrees_with_saelens() -> None:
    sae = random_sae()
    folded = Parameters.of(sae).fold_decoder_norms()
    before = sae(INPUTS)
    sae.fold_W_dec_norm()
    for name, tensor in folded.tensors().items():
        torch.testing.assert_close(tensor, getattr(sae, name).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(folded, INPUTS), before, rtol=1e-4, atol=1e-4)


def test_fold_scales_agrees_with_saelens_and_with_the_definition() -> None:
    sae = random_sae()
    folded = Parameters.of(sae).fold_scales(0.37)
    sae.fold_activation_norm_scaling_factor(0.37)
    for name, tensor in folded.tensors().items():
        torch.testing.assert_close(tensor, getattr(sae, name).detach())
    trained = Parameters.of(random_transcoder(skip=True, d_out=D_OUT)).to(torch.float64)
    x = INPUTS.double()
    want = outputs(trained, 0.37 * x) / 2.3
    torch.testing.assert_close(outputs(trained.fold_scales(0.37, 2.3), x), want)


def test_fold_input_gain_reads_the_gained_input() -> None:
    trained = Parameters.of(random_transcoder(skip=True, d_out=D_OUT)).to(torch.float64)
    gain = 0.5 + torch.rand(D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = INPUTS.double()
    torch.testing.assert_close(
        outputs(trained.fold_input_gain(gain), x * gain), outputs(trained, x)
    )
    with pytest.raises(ValueError, match="zeros"):
        trained.fold_input_gain(torch.zeros(D_IN))


def test_dead_parameters_write_nothing() -> None:
    dead = dead_parameters(D_IN, D_SAE, D_OUT, skip=True)
    assert torch.equal(outputs(dead, INPUTS), torch.zeros(len(INPUTS), D_OUT))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_enc", torch.randn(D_SAE, D_IN), "W_dec has shape"),
        ("b_enc", torch.randn(D_SAE + 1), "b_enc has shape"),
        ("b_dec", torch.randn(1, D_IN), "b_dec has shape"),
        ("threshold", torch.full((D_SAE,), -0.1), "clamp_"),
        ("W_dec", torch.full((D_SAE, D_IN), torch.nan), "NaN"),
    ],
)
def test_broken_parameters_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    tensors = {**Parameters.of(random_sae()).tensors(), name: value}
    if name == "W_enc":
        tensors = {key: tensors[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        message = "b_enc has shape"
    with pytest.raises(ValueError, match=message):
        Parameters.named(tensors)


def test_other_architectures_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="no thresholds"):
        Parameters.of(torch.nn.Linear(3, 5))
    with pytest.raises(ValueError, match="scale"):
        Parameters.of(random_sae()).fold_scales(-1.0)
    with pytest.raises(ValueError, match="one scale"):
        Parameters.of(random_sae()).fold_scales(1.5, 2.5)


@pytest.mark.parametrize("given", [3.0, None, "ab", [1.0], [1.0, 2.0, 3.0, 4.0], [1.0, "2"]])
def test_scales_of_a_pair_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected two numbers"):
        PairScale.of(given)
    assert PairScale.of([0.37, 2.9, [1.0], [2.0, 3.0]]) == (0.37, 2.9, (1.0,), (2.0, 3.0))
