"""The step of a cross-layer transcoder: gradients, causality, folding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.transcoders.clt import CLTTrainingConfig, CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep
from tests.step.kernels.cases import DEVICE
from tests.transcoders.clt.random_clt import (
    BATCH,
    D_OUT,
    D_SAE,
    LAYERS,
    random_batch,
    random_clt,
    set_bandwidths,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def on(device: str, rows: list[Tensor]) -> list[Tensor]:
    return [each.to(device) for each in rows]


def reference_loss(
    model: CrossLayerTranscoder,
    inputs: list[Tensor],
    targets: list[Tensor],
    bandwidths: list[float],
    coefficients: list[float],
    mode: str,
    to_input: float,
) -> Tensor:
    """The definition, dense, with a matrix for every pair of layers and estimators by detaching."""
    outputs = [source.b_dec.expand(len(inputs[0]), D_OUT) for source in model.sources]
    penalty = torch.zeros(())
    for index, source in enumerate(model.sources):
        theta, epsilon = source.threshold, bandwidths[index]
        z = inputs[index] @ source.W_enc + source.b_enc
        reach = to_input * z + (1 - to_input) * z.detach()
        window = ((z - theta).abs() < epsilon / 2).float()
        slope = window * ((reach - theta) - (reach - theta).detach()) / epsilon  # 0, with gradient
        gates = (z > theta).float() + slope
        f = z * (z > theta) + theta.detach() * slope
        pairs = source.W_dec.reshape(D_SAE, source.later, D_OUT)
        for later in range(source.later):
            outputs[index + later] = outputs[index + later] + f @ pairs[:, later]
        norms = pairs.square().sum((1, 2)).sqrt()
        costs = gates if mode == "step" else torch.tanh(1.7 * f * norms)
        penalty = penalty + coefficients[index] * costs.sum(1).mean()
    errors = [(y - found).square().sum(1).mean() for y, found in zip(targets, outputs, strict=True)]
    return torch.stack(errors).sum() + penalty


@pytest.mark.parametrize(
    "path", ["sparse", "screened", "dense", pytest.param("triton", marks=pytest.mark.kernels)]
)
@pytest.mark.parametrize(
    ("mode", "to_input"), [("step", 0.37), ("step", 0.0), ("tanh", 1.0), ("tanh", 0.0)]
)
def test_gradients_are_the_definition_s(path: str, mode: Any, to_input: float) -> None:
    inputs, targets = random_batch()
    bandwidths = [0.7, 1.1, 0.4]
    cfg = CLTTrainingConfig(
        l0_coefficient=0.23,
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_tanh_scale=1.7,
        jumprelu_ste_to_input=to_input > 0,
        jumprelu_ste_input_share=to_input or None,
        step_kernel=path,  # type: ignore[arg-type]
    )
    model, device = random_clt(), DEVICE if path == "triton" else "cpu"
    training_step = CLTTrainingStep(model.to(device), cfg)
    set_bandwidths(training_step, bandwidths)
    loss = training_step.loss(on(device, inputs), on(device, targets)).loss.cpu()
    loss.backward()
    found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cpu()
    expected = reference_loss(model, inputs, targets, bandwidths, [0.23] * LAYERS, mode, to_input)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.kernels
def test_a_step_with_too_little_room_in_one_layer_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jumprelu_plugin.step.kernels import buffers

    monkeypatch.setattr(buffers, "GRAIN", 1)
    steps = {
        path: CLTTrainingStep(
            random_clt().to(DEVICE), CLTTrainingConfig(target_l0=5, step_kernel=path)
        )
        for path in ("sparse", "triton")
    }
    for training_step in steps.values():
        set_bandwidths(training_step, [0.7, 1.1, 0.4])
    room = steps["triton"]._buffers[1]
    room.capacity = 7
    inputs, targets = (on(DEVICE, rows) for rows in random_batch())
    outputs = {path: step.loss(inputs, targets) for path, step in steps.items()}
    assert room.capacity > 100
    torch.testing.assert_close(outputs["triton"].output, outputs["sparse"].output)
    torch.testing.assert_close(outputs["triton"].loss, outputs["sparse"].loss)
    assert outputs["triton"].l0 == outputs["sparse"].l0
    assert [int(n) for n in outputs["triton"].active] == [int(n) for n in outputs["sparse"].active]


def test_a_layer_writes_to_itself_and_later_layers_only() -> None:
    model = random_clt()
    x = torch.stack(random_batch()[0])
    before = model(x)
    for layer in range(LAYERS):
        changed = x.clone()
        changed[layer] += 0.5
        difference = (model(changed) - before).abs().amax((1, 2))
        assert (difference[:layer] == 0).all()
        assert (difference[layer:] > 1e-2).all()


def test_it_is_what_a_matrix_for_each_pair_of_layers_gives() -> None:
    model = random_clt()
    x = torch.stack(random_batch()[0])
    latents, outputs = model.encode(x), model(x)
    for m, target in enumerate(model.sources):
        expected = target.b_dec.expand(BATCH, D_OUT)
        for layer in range(m + 1):
            source = model.sources[layer]
            z = x[layer] @ source.W_enc + source.b_enc
            f = torch.where(z > source.threshold, z, 0.0)
            torch.testing.assert_close(latents[layer], f)
            columns = slice((m - layer) * D_OUT, (m - layer + 1) * D_OUT)
            expected = expected + f @ source.W_dec[:, columns]
        torch.testing.assert_close(outputs[m], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="got 2 layers.*has 3"):
        model(x[:2])


def test_folding_is_exact() -> None:
    scaled, raw = random_clt().double(), random_clt().double()
    scales = [(0.7, 3.1), (1.9, 0.2), (5.3, 1.3)]
    raw.fold_scales_(scales)
    x = torch.stack(random_batch()[0]).double()
    s_in, s_out = (torch.tensor(side, dtype=torch.float64)[:, None, None]
                   for side in zip(*scales, strict=True))  # fmt: skip
    torch.testing.assert_close(raw(x), scaled(x * s_in) / s_out, rtol=1e-12, atol=1e-12)
    assert torch.equal(raw.sources[1].threshold, scaled.sources[1].threshold)
    with pytest.raises(ValueError, match="2 pairs of scales for 3 layers"):
        raw.fold_scales_(scales[:2])
    with pytest.raises(ValueError, match="scale is 0"):
        raw.fold_scales_([(1.0, 0.0), *scales[1:]])
