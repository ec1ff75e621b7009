"""Cross-layer transcoders trained on rows with known structure."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.transcoders.clt import CLTConfig, CLTTrainingConfig, CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep
from tests.transcoders.clt.random_clt import D_IN, D_OUT, D_SAE, LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")


def structured(batch: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sparse causes that a layer sees and that its own and all later outputs depend on."""
    fixed = torch.Generator().manual_seed(11)
    mix = torch.randn(LAYERS, 29, D_IN, generator=fixed)
    out = torch.randn(LAYERS, LAYERS, 29, D_OUT, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    causes = torch.rand(LAYERS, batch, 29, generator=generator)
    causes = causes * (torch.rand(LAYERS, batch, 29, generator=generator) < 0.1)
    inputs = [causes[layer] @ mix[layer] for layer in range(LAYERS)]
    targets = [
        torch.stack([causes[layer] @ out[layer, m] for layer in range(m + 1)]).sum(0)
        for m in range(LAYERS)
    ]
    return inputs, targets


def trained(
    steps: int, **fields: Any
) -> tuple[CLTTrainingStep, list[list[float]], list[list[float]]]:
    model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
    training_step = CLTTrainingStep(model, CLTTrainingConfig(step_kernel="sparse", **fields))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    l0, fvu = [], []
    for step in range(steps):
        output = training_step.loss(*structured(211, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        l0.append(output.l0)
        fvu.append(output.fvu(LAYERS))
    return training_step, l0, fvu


Trained = tuple[CLTTrainingStep, list[list[float]], list[list[float]]]


@pytest.fixture(scope="module")
def of_default_mode(one_thread_throughout: None) -> Trained:
    """Trained to an L0 of 5, for the tests that look at it from three sides."""
    torch.manual_seed(3)
    return trained(240, target_l0=5.0, jumprelu_sparsity_loss_mode="step")


@pytest.mark.parametrize("mode", ["step", "tanh"])
def test_each_layer_reaches_its_target_l0(mode: str, of_default_mode: Trained) -> None:
    training_step, l0, fvu = (
        of_default_mode
        if mode == "step"
        else trained(240, target_l0=5.0, jumprelu_sparsity_loss_mode=mode)
    )
    last = torch.tensor(l0[-60:]).mean(0)
    assert ((last - 5).abs() < 0.5).all(), last
    assert max(fvu[-1]) < 0.5 * min(fvu[0]) and max(fvu[-1]) < 0.4
    coefficients = [float(control.multiplier) for control in training_step.controls]
    assert min(coefficients) > 0 and len(set(coefficients)) == LAYERS
    for source in training_step.model.sources:
        torch.testing.assert_close(source.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert (source.threshold >= 0).all()


def test_a_fixed_coefficient_warms_up_and_a_higher_one_is_sparser() -> None:
    sparse, dense = (
        torch.tensor(trained(80, l0_coefficient=c, l0_warm_up_steps=20)[1])[-10:].mean()
        for c in (0.5, 0.005)
    )
    assert sparse < 0.8 * dense
    training_step = trained(7, l0_coefficient=0.5, l0_warm_up_steps=20)[0]
    assert training_step._coefficients() == [0.5 * 8 / 20] * LAYERS


def test_cross_layer_decoders_carry_what_a_layer_s_own_input_cannot(
    of_default_mode: Trained,
) -> None:
    """The last output also depends on earlier layers' causes: cutting those decoders costs."""
    inputs, targets = structured(499, 10_001)
    model = deepcopy(of_default_mode[0].model)
    whole = (model(torch.stack(inputs))[2] - targets[2]).square().sum()
    for source in model.sources:
        source.W_dec.data[:, D_OUT:] = 0
    cut = (model(torch.stack(inputs))[2] - targets[2]).square().sum()
    assert cut > 2 * whole


def test_an_outlier_counts_less_at_the_output_that_has_it() -> None:
    inputs, targets = structured(101, 7)
    targets[1][13] *= 150
    torch.manual_seed(3)
    model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
    # A fixed penalty of 0 leaves the error alone.
    cfg = CLTTrainingConfig(l0_coefficient=0.0, step_kernel="sparse", outlier_norm_ratio=4.0)
    training_step = CLTTrainingStep(model, cfg)
    output = training_step.loss(inputs, targets)
    expected = 0.0
    for y, y_hat in zip(targets, output.output.split(D_OUT, 1), strict=True):
        norm = y.norm(dim=1)
        worth = (4 * norm.median() / norm).clamp(max=1).square()
        expected += float((worth * (y_hat - y).square().sum(1)).sum()) / 101
    assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    full = float((output.output - output.target).square().sum()) / 101
    assert full > 20 * expected


def test_an_outlier_in_the_first_batch_moves_no_bias_and_no_bandwidth() -> None:
    inputs, targets = structured(211, 7)
    wild = [y.clone() for y in targets]
    wild[2][13] *= 150
    usual = torch.arange(211) != 13
    found = []
    for x, y in ((inputs, wild), ([a[usual] for a in inputs], [b[usual] for b in targets])):
        torch.manual_seed(3)
        model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
        cfg = CLTTrainingConfig(target_l0=5.0, step_kernel="sparse", outlier_norm_ratio=10.0)
        training_step = CLTTrainingStep(model, cfg)
        training_step.loss(x, y)
        found.append(
            [
                *(c.bandwidth or 0.0 for c in training_step.controls),
                *(float(s.b_dec.sum()) for s in model.sources),
            ]
        )
        found[-1] += [float(s.W_dec.sum()) for s in model.sources]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_density_limit_acts_in_every_layer(of_default_mode: Trained) -> None:
    """A latent that is worth half more than the cost of a firing may stay above it."""

    def densities(training_step: CLTTrainingStep) -> Tensor:
        inputs, _ = structured(1009, 999)
        layers = zip(training_step.model.sources, inputs, strict=True)
        return torch.stack([(s.encode(x) > 0).float().mean(0) for s, x in layers])

    without = densities(of_default_mode[0])
    torch.manual_seed(3)  # the same start
    limited = densities(trained(240, target_l0=5.0, max_latent_density=0.2)[0])
    above, above_without = ((found - 0.2).relu().sum(1) for found in (limited, without))
    assert (above < above_without).all() and above.sum() < 0.7 * above_without.sum()
    torch.testing.assert_close(limited.sum(1), torch.full((LAYERS,), 5.0), rtol=0.05, atol=0)


def test_dead_latents_of_any_layer_are_resampled() -> None:
    model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
    training_step = CLTTrainingStep(model, CLTTrainingConfig(target_l0=5.0, step_kernel="sparse"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Looked for every 12 steps, and dead after as many: found at the second look.
    for step in range(30):
        if step == 1:
            for index, source in enumerate(model.sources):
                source.b_enc.data[index : index + 3] = -100.0
        if step == 11:
            assert training_step.dead_share() == 0.0
        if step == 20:
            assert training_step.dead_share() >= 3 / D_SAE
        output = training_step.loss(*structured(211, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for index, source in enumerate(model.sources):
        assert (source.b_enc[index : index + 3] > -50).all()
        firing = training_step.controls[index].firing
        assert firing is not None and (firing.silent[index : index + 3] < 10).all()
    assert training_step.dead_share() == 0.0
