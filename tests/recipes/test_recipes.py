"""Every recipe trains, by hand and by flags alike, and what it saves is stock SAELens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.cli.saelens_flags import Command, run_config
from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.recipes import ANTHROPIC_2025, GEMMA_SCOPE_2, RECIPES, Recipe, TranscoderRecipe
from jumprelu_plugin.step.losses import QuadraticL0, TanhL0, WithDensityPenalty

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, BATCH, STEPS = 23, 331, 257, 40
# The one number a recipe leaves to whoever takes it.
CHOSEN = {
    "default": {"target_l0": 5.0},
    "matryoshka": {"target_l0": 5.0},
    "anthropic_2025": {"l0_coefficient": 0.4},
}
OF_SAES = [recipe for recipe in RECIPES.values() if not isinstance(recipe, TranscoderRecipe)]
each = pytest.mark.parametrize("recipe", OF_SAES, ids=lambda recipe: recipe.name)


def tokens() -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(2)
    directions = nn.functional.normalize(torch.randn(101, D_IN, generator=g), dim=1)
    while True:
        present = torch.rand(BATCH, 101, generator=g) < 0.05
        yield 3.1 * (present * (1 + torch.rand(BATCH, 101, generator=g))) @ directions


def trained(recipe: Recipe, **changes: Any) -> JumpReLUTrainingSAE:
    cfg = recipe.sae_config(
        D_IN, D_SAE, step_kernel="sparse", **{**CHOSEN.get(recipe.name, {}), **changes}
    )
    cfg.l0_warm_up_steps = recipe.l0_warm_up_steps(STEPS)
    sae = JumpReLUTrainingSAE(cfg)
    lr = recipe.learning_rate(cfg, STEPS * BATCH, BATCH)
    trainer = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=recipe.runner.get("lr_end", lr / 10),
        lr_decay_steps=recipe.lr_decay_steps(STEPS),
        n_batches_for_norm_estimate=5,
    )
    SAETrainer(trainer, sae, data_provider=tokens()).fit()
    return sae.eval()


@each
def test_every_recipe_trains_and_saves_a_stock_sae(recipe: Recipe, tmp_path: Path) -> None:
    start = JumpReLUTrainingSAE(recipe.sae_config(D_IN, D_SAE, **CHOSEN.get(recipe.name, {})))
    sae = trained(recipe)
    assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())
    directions = [nn.functional.normalize(s.W_dec.detach(), dim=1) for s in (start, sae)]
    assert (directions[1] - directions[0]).norm() > 0
    sae.save_inference_model(tmp_path)
    stock = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(stock) is sae_lens.JumpReLUSAE
    x = next(tokens())
    torch.testing.assert_close(stock(x), sae(x), rtol=1e-4, atol=1e-4)


@each
def test_flags_and_python_make_the_same_config(recipe: Recipe) -> None:
    chosen = CHOSEN.get(recipe.name, {})
    given = ["--d_in", str(D_IN), "--d_sae", str(D_SAE), "--training_tokens", "1000000000"]
    given += [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
    cfg = run_config(given, recipe.name, Command())
    steps = 1_000_000_000 // recipe.runner["train_batch_size_tokens"]
    expected = recipe.sae_config(
        D_IN, D_SAE, l0_warm_up_steps=recipe.l0_warm_up_steps(steps), **chosen
    )
    for field in fields(expected):
        if field.name != "metadata":
            assert getattr(cfg.sae, field.name) == getattr(expected, field.name), field.name
    assert {name: getattr(cfg, name) for name in recipe.runner} == dict(recipe.runner)
    assert cfg.lr_decay_steps == recipe.lr_decay_steps(steps)
    batch = recipe.runner["train_batch_size_tokens"]
    assert cfg.lr == recipe.learning_rate(expected, 1_000_000_000, batch)
    assert cfg.lr_end == recipe.runner.get("lr_end", cfg.lr / 10)
    assert f"LR-{cfg.lr}-" in cfg.logger.run_name


@pytest.mark.parametrize("name", ["default", "matryoshka"])
def test_without_a_target_the_learning_rate_is_that_of_an_l0_of_40(name: str) -> None:
    recipe = RECIPES[name]
    free, held = (
        recipe.sae_config(D_IN, D_SAE, **given)
        for given in ({"l0_coefficient": 0.3, "target_l0": None}, {"target_l0": 40.0})
    )
    rates = [recipe.learning_rate(sae, 7_001 * BATCH, BATCH) for sae in (free, held)]
    assert rates[0] == rates[1] == learning_rate(D_IN, D_SAE, 40.0, BATCH, 7_001)


@each
def test_its_run_has_a_buffer_that_holds_its_batches(recipe: Recipe) -> None:
    given = ["--d_in", "23", "--d_sae", "331", "--training_tokens", "1000000", "--target_l0", "9"]
    size = ["--context_size", "113"]
    cfg = run_config([*given, *size], recipe.name, Command())
    batch = cfg.train_batch_size_tokens
    sequences = 20 if batch <= 20 * 113 else -(-4 * batch // 113)
    assert cfg.n_batches_in_buffer == sequences and sequences * 113 >= batch
    kept = run_config([*given, *size, "--n_batches_in_buffer=577"], recipe.name, Command())
    assert kept.n_batches_in_buffer == 577


def test_flags_of_ones_own_win() -> None:
    given = [
        "--d_in", "23", "--d_sae", "331", "--lr_decay_steps=3", "--l0_warm_up_steps", "5",
        "--matryoshka_widths", "7", "--target_l0", "9", "--lr", "0.0017",
    ]  # fmt: skip
    for recipe in (GEMMA_SCOPE_2, ANTHROPIC_2025, RECIPES["default"]):
        cfg = run_config(given, recipe.name, Command())
        assert (cfg.lr_decay_steps, cfg.sae.l0_warm_up_steps, cfg.sae.target_l0) == (3, 5, 9)  # type: ignore[attr-defined]
        assert cfg.sae.matryoshka_widths == [7]  # type: ignore[attr-defined]
        assert cfg.lr == 0.0017


def test_gemma_scope_2_is_what_it_says() -> None:
    cfg = GEMMA_SCOPE_2.sae_config(d_in=2304, d_sae=65_536, target_l0=100)
    assert cfg.resolve().matryoshka_widths == (2048, 6144, 14_336, 30_720)
    sae = JumpReLUTrainingSAE(GEMMA_SCOPE_2.sae_config(D_IN, D_SAE, target_l0=9))
    assert sae.sparsity == WithDensityPenalty(QuadraticL0(9), 0.01)
    assert sae.bandwidth == pytest.approx(0.001 * math.sqrt(D_IN))
    assert GEMMA_SCOPE_2.l0_warm_up_steps(10**6) == 50_000


def test_anthropic_s_initialisation() -> None:
    """W_dec uniform in ±1/√d_in, W_enc its scaled transpose, and biases for a known frequency."""
    d_sae = 20_011  # so that 10,000/d_sae is a share of tokens
    sae = JumpReLUTrainingSAE(ANTHROPIC_2025.sae_config(D_IN, d_sae, l0_coefficient=0.4)).train()
    edge = D_IN**-0.5
    assert 0.99 * edge < float(sae.W_dec.abs().max()) <= edge
    assert float(sae.W_dec.std()) == pytest.approx(edge / math.sqrt(3), rel=0.01)
    torch.testing.assert_close(sae.W_enc, D_IN / d_sae * sae.W_dec.t())
    x = next(tokens())
    step_input = TrainStepInput(
        sae_in=x,
        coefficients={"l0": 0.0},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    found = sae.training_forward_pass(step_input)
    share = (found.feature_acts.to_dense() > 0).float().mean(0)
    assert (share - 10_000 / d_sae).abs().max() <= 1.5 / BATCH
    assert float(sae.threshold.min()) == float(sae.threshold.max()) == pytest.approx(0.1)
    # Every latent below its threshold is pulled, though none was called dead.
    assert float(found.losses["pre_act_loss"]) > 0
    assert sae.sparsity == TanhL0(4.0) and sae.bandwidth == 2.0


def test_anthropic_s_coefficient_rises_over_the_whole_run() -> None:
    sae = JumpReLUTrainingSAE(
        ANTHROPIC_2025.sae_config(
            D_IN, D_SAE, l0_coefficient=0.4, l0_warm_up_steps=ANTHROPIC_2025.l0_warm_up_steps(STEPS)
        )
    )
    coefficient: Any = sae.get_coefficients()["l0"]
    assert (coefficient.value, coefficient.warm_up_steps) == (0.4, STEPS)
    assert ANTHROPIC_2025.lr_decay_steps(STEPS) == STEPS // 5


def test_a_free_decoder_is_normalised_at_the_end_and_computes_the_same() -> None:
    sae = trained(ANTHROPIC_2025)
    x = next(tokens())
    before = sae(x).detach()
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)


@each
def test_a_target_takes_the_place_of_any_recipes_penalty(recipe: Recipe) -> None:
    """A published penalty's warm-up would have nothing to warm up."""
    sae = recipe.sae_config(D_IN, D_SAE, target_l0=5.0, l0_coefficient=None)
    assert sae.l0_warm_up_steps == 0
    JumpReLUTrainingSAE(sae)
