"""Learning rates of a whole run, and schedules longer than the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.training.optim import get_lr_scheduler

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.health.schedule import (
    lr_sum,
    repaired,
    schedule_findings,
    steps_taken,
)
from tests.tiny import D_MODEL
from tests.training.runs import BATCH, D_SAE, config, run, token_rows

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")


@pytest.mark.parametrize("name", ["constant", "cosineannealing"])
@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0), (37, 0), (0, 101), (37, 101)])
def test_learning_rates_add_up_to_saelens_schedule(name: str, warm_up: int, decay: int) -> None:
    cfg = runner_config(lr=3e-3, lr_scheduler_name=name, lr_warm_up_steps=warm_up,
                        lr_decay_steps=decay, training_tokens=307 * 31)  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = get_lr_scheduler(name, optimizer, 307, 3e-3, warm_up, decay, 3e-4, 1)
    total = 0.0
    for _ in range(307):
        total += optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    assert lr_sum(cfg) == pytest.approx(total, rel=0.03)


def runner_config(**fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    sae = JumpReLUTrainingSAEConfig(d_in=33, d_sae=41, target_l0=7)
    given = {"sae": sae, "train_batch_size_tokens": 31, "logger": LoggingConfig(log_to_wandb=False),
             "checkpoint_path": None, "verbose": False, **fields}  # fmt: skip
    return LanguageModelSAERunnerConfig(**given)


@pytest.mark.parametrize(("tokens", "steps"), [(4 * 31, 4), (4 * 31 + 1, 5), (4 * 31 - 1, 4)])
def test_the_trainer_takes_as_many_steps_as_are_said(tokens: int, steps: int) -> None:
    seen = 0
    while seen < tokens:  # as SAELens' trainer counts
        seen += 31
    assert steps_taken(runner_config(training_tokens=tokens)) == steps == seen // 31


def test_no_more_batches_are_suggested_for_the_scale_than_are_trained_on() -> None:
    cfg = runner_config(training_tokens=7 * 31, n_batches_for_norm_estimate=11)
    cfg.sae.normalize_activations = "expected_average_only_in"
    (found,) = [f for f in schedule_findings(cfg) if f.name == "input scale"]
    assert "11 batches" in found.message and found.suggestion.endswith("=7")


@pytest.mark.parametrize(
    ("lr", "fields", "suggested"),
    [
        (3e-4, {"target_l0": 7}, "0.0032"),  # SAELens' default
        (0.2, {"target_l0": 7}, "0.0032"),
        (0.009, {"target_l0": 7}, None),
        (3e-4, {"l0_coefficient": 0.3}, None),
        (3e-4, {"target_l0": 7, "standardize_activations": False}, None),
    ],
)
def test_a_learning_rate_far_from_the_rule_is_a_warning(
    lr: float, fields: dict[str, Any], suggested: str | None
) -> None:
    sae = JumpReLUTrainingSAEConfig(d_in=23, d_sae=41, **fields)
    found = [f for f in schedule_findings(runner_config(sae=sae, lr=lr)) if f.name == "lr"]
    if suggested is None:
        assert found == []
    else:
        (finding,) = found
        assert finding.severity == "warning" and f"set lr={suggested}" in finding.suggestion


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr_end": 1e-5}, ["lr_end is 1e-05", "'constant'", "lr 0.003 stays"]),
        ({"lr_end": 1e-5, "lr_decay_steps": 101}, ["falls to 0 over the last 101 steps"]),
        ({"lr_end": 1e-5, "lr_scheduler_name": "cosineannealing"}, []),
        ({"lr_decay_steps": 101}, []),
        ({"lr_end": 3e-3}, []),
        ({"lr_end": 0.0, "lr_decay_steps": 101}, []),
    ],
    ids=str,
)
def test_an_end_that_the_schedule_does_not_read_is_named(
    fields: dict[str, Any], words: list[str]
) -> None:
    cfg = runner_config(lr=3e-3, training_tokens=307 * 31, **fields)
    found = [f for f in schedule_findings(cfg) if f.name == "lr_end"]
    assert [f.severity for f in found] == ["warning"] * bool(words)
    assert all(word in found[0].message for word in words)


def test_schedules_that_do_not_fit_are_shortened_with_a_warning(
    model: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, l0_coefficient=0.3,
                                    l0_warm_up_steps=10_000, step_kernel="sparse")  # fmt: skip
    cfg = config(tmp_path, sae=sae, training_tokens=40 * BATCH, lr_warm_up_steps=90,
                 lr_decay_steps=30)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        runner = run(model, cfg, token_rows())
    assert "lr_warm_up_steps 90 and lr_decay_steps 30 do not fit into 40 steps" in caplog.text
    assert "l0_warm_up_steps is 10,000" in caplog.text
    ran = json.loads((tmp_path / "output" / "runner_cfg.json").read_text())
    assert (ran["lr_warm_up_steps"], ran["lr_decay_steps"]) == (15, 5)
    assert runner.sae.cfg.l0_warm_up_steps == 20
    assert runner.trainer.get_coefficients() == {"l0": 0.3}
    # Nobody's config is changed behind their back.
    assert (cfg.lr_warm_up_steps, sae.l0_warm_up_steps) == (90, 10_000)
    assert repaired(runner.cfg) == (runner.cfg, [])
