"""The sweep trains as SAELens' own `fit` does, and its measures are what their formulas say."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin.models.hooks import attached, flat_heads
from jumprelu_plugin.studies.sweep.architectures import ARCHITECTURES, PLUGIN, centers_itself
from jumprelu_plugin.studies.sweep.measures import (
    DENSITY_EDGES,
    PeakMemory,
    density_histogram,
    exp_entropy_per_latent,
    threshold_histogram,
    uniformity_of_importance,
)
from jumprelu_plugin.studies.sweep.training import as_saved, batches, less, train, trainer_config
from tests.tiny import HEADS, RESIDUAL, tiny_sae, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_kernel")
D_IN, D_SAE, BATCH, STEPS = 17, 64, 43, 30
SPECIAL = (0, 1, 2)


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(611, 5, generator=generator).relu() @ torch.randn(
        5, D_IN, generator=generator
    )


def made(name: str) -> Any:
    torch.manual_seed(2)
    return ARCHITECTURES[name](D_IN, D_SAE, 4.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_trains_as_fit_does(name: str, one_thread: None) -> None:
    cfg = trainer_config(STEPS, BATCH, 3e-3)
    mine, theirs = made(name), made(name)
    run = train(mine, batches(rows(), BATCH, seed=5), cfg, samples=7)
    torch.manual_seed(2)  # resampling draws
    SAETrainer(cfg=cfg, sae=theirs, data_provider=batches(rows(), BATCH, seed=5)).fit()
    for (key, value), wanted in zip(
        mine.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), key
    steps = [sample["step"] for sample in run.dynamics]
    assert steps == [1, 4, 8, 12, 16, 20, 24, 28]
    assert all(0 <= sample["fvu"] < 10 and sample["l0"] > 0 for sample in run.dynamics)
    has_thresholds = name in (PLUGIN, "jumprelu")
    assert (run.dynamics[-1]["threshold_quantiles"] is not None) == has_thresholds
    assert (run.dynamics[-1]["coefficient"] is None) == ("topk" in name)


def test_the_controller_brings_l0_to_its_target(one_thread: None) -> None:
    sae = made("standard")
    run = train(sae, batches(rows(), BATCH, seed=5), trainer_config(900, BATCH, 3e-3))
    assert np.mean([sample["l0"] for sample in run.dynamics[-15:]]) == pytest.approx(4, rel=0.15)


def test_the_center_is_put_back() -> None:
    sae, center = made("topk"), torch.arange(D_IN) * 1.0
    assert not centers_itself(sae) and centers_itself(made(PLUGIN))
    source = less(batches(rows() + center, BATCH, seed=5), center)
    train(sae, source, trainer_config(STEPS, BATCH, 3e-3))
    without, with_center = as_saved(sae), as_saved(sae, center)
    with torch.no_grad():
        torch.testing.assert_close(
            with_center.decode(with_center.encode(rows() + center)),
            without.decode(without.encode(rows())) + center,
            rtol=1e-4,
            atol=1e-4,
        )


# ---------------------------------------------------------------- measures


def test_densities_are_counted_in_tenths_of_a_decade() -> None:
    generator = torch.Generator().manual_seed(4)
    frequency = 10 ** (-7 * torch.rand(5_003, generator=generator, dtype=torch.float64))
    frequency[:7], frequency[7:10] = 0.0, 1.0
    counts = density_histogram(frequency)
    inside = np.clip(np.log10(frequency[7:].numpy()), DENSITY_EDGES[0], 0)
    assert counts == np.histogram(inside, DENSITY_EDGES)[0].tolist()
    assert sum(counts) == 5_003 - 7


def test_thresholds_are_counted() -> None:
    sae = tiny_sae()
    found = threshold_histogram(sae)
    assert found is not None and sum(found["counts"]) == 41
    assert found["edges"][0] == pytest.approx(float(sae.threshold.min()))
    assert threshold_histogram(as_saved(made("topk"))) is None
    with torch.no_grad():
        sae.threshold.fill_(0.3)
    found = threshold_histogram(sae)
    assert found is not None and sum(found["counts"]) == 41


def test_uniformity_is_one_for_equal_effects_and_one_over_l0_for_a_single_one() -> None:
    equal = torch.tensor([0.0, -2.0, 2.0, 2.0, 0.0])
    single = torch.tensor([1e-12, 5.0, 1e-12, 1e-12, 0.0])
    half = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0])
    nothing = torch.zeros(5)
    found = exp_entropy_per_latent(torch.stack([equal, single, nothing, half]))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert found.tolist() == pytest.approx([1.0, 0.25, np.exp(entropy) / 2], abs=1e-9)


@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_uniformity_is_of_the_correct_logits_derivative_by_each_latent(
    model: Any, hook: str
) -> None:
    """Against derivatives by the latents themselves where the SAE's error is kept, which leaves the
    model's own activation in place, one sequence at a time."""
    sae, tokens = tiny_sae(hook), tiny_tokens()
    found = uniformity_of_importance(
        model, sae, tokens, hook=hook, special_token_ids=SPECIAL, batch_size=2
    )
    sae.turn_off_forward_pass_hook_z_reshaping()
    ratios = []
    for text in tokens:
        kept: dict[str, torch.Tensor] = {}

        def splice(activation: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> torch.Tensor:
            flat = flat_heads(activation)
            kept["f"] = sae.encode(flat[:, 1:]).detach().requires_grad_()
            error = flat[:, 1:] - sae.decode(kept["f"]).detach()
            changed = torch.cat([flat[:, :1], sae.decode(kept["f"]) + error], 1)
            return changed.reshape(activation.shape)

        with attached(model, hook, splice):
            logits = model(text[None], return_type="logits")
        centered = logits[0] - logits[0].mean(-1, keepdim=True)
        torch.stack([centered[i, text[i + 1]] for i in range(1, len(text) - 1)]).sum().backward()
        assert kept["f"].grad is not None
        effects = (kept["f"] * kept["f"].grad)[0].detach().double().abs()
        for row in effects[effects.sum(1) > 0]:
            p = row[row > 0] / row.sum()
            ratios.append(float((-(p * p.log()).sum()).exp()) / len(p))
    assert found == pytest.approx(np.mean(ratios), rel=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peak_memory_sees_what_was_freed() -> None:
    memory = PeakMemory("cpu")
    with memory.measured():
        block = torch.ones(40_000_000)
        del block
    if memory.bytes is not None:
        assert 150e6 < memory.bytes < 400e6


def test_on_step_is_called_for_every_step() -> None:
    calls = count()
    train(
        made("topk"),
        batches(rows(), BATCH, seed=5),
        trainer_config(STEPS, BATCH, 3e-3),
        on_step=lambda: next(calls),  # type: ignore[arg-type,return-value]
    )
    assert next(calls) == STEPS
