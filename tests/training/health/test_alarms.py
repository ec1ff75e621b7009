"""Alarms of a running training: which unhealthy run raises which, once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import corpus, tokenized_dataset
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.training.health.alarms import Monitor, StepStats
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from jumprelu_plugin.training.trainer import JumpReLUTrainer
from tests.training.known_directions import BATCH as TOKENS
from tests.training.known_directions import D_IN, tokens
from tests.training.known_directions import D_SAE as WIDTH

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")


def lengthening_encoder(
    batches: Iterator[torch.Tensor], sae: JumpReLUTrainingSAE, factor: float, after: int
) -> Iterator[torch.Tensor]:
    """The batches; the encoder is multiplied by `factor` when `after` of them have been drawn."""
    yield from islice(batches, after)
    with torch.no_grad():
        sae.W_enc.mul_(factor)
    yield from batches


def trained(
    steps: int, lr: float = 3e-3, lengthen_encoder: float = 1.0, **fields: Any
) -> JumpReLUTrainer:
    """A trainer on sums of known directions, not yet run.

    Args:
        lengthen_encoder: the encoder is multiplied by this in mid-run. What a learning rate far too
            high does to it is chaotic, so it differs from one processor to the next.
    """
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH, step_kernel="sparse", **fields)
    )
    cfg = SAETrainerConfig(
        total_training_samples=steps * TOKENS,
        train_batch_size_samples=TOKENS,
        n_batches_for_norm_estimate=5,
        lr=lr,
        lr_end=lr,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=50),
    )
    batches = lengthening_encoder(tokens(3), sae, lengthen_encoder, after=steps // 2)
    return JumpReLUTrainer(cfg=cfg, sae=sae, data_provider=batches)


SICK: dict[str, tuple[dict[str, Any], str]] = {
    "thresholds starved": ({"target_l0": 5, "jumprelu_bandwidth": 1e-6}, "raise jumprelu_bandw"),
    "encoder runaway": ({"target_l0": 5, "lengthen_encoder": 20.0}, "lower lr"),
    "loss spike": ({"target_l0": 5, "lr": 0.3}, "lower lr"),
    "latents dying": ({"l0_coefficient": 300.0}, "lower lr or l0_coefficient"),
    "L0 off target": ({"l0_coefficient": 300.0}, "lower l0_coefficient"),
    "weights frozen": ({"target_l0": 5, "dtype": "bfloat16", "lr": 1e-5}, "in float32"),
}


@pytest.mark.parametrize("name", SICK)
def test_an_unhealthy_run_raises_its_alarm_once_with_a_suggestion(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields, remedy = SICK[name]
    trainer = trained(300, **fields)
    trainer.metrics_path = tmp_path / "metrics.jsonl"
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    lines = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
    (line,) = (line for line in lines if line.get("alarm") == name)
    assert remedy in line["suggestion"] and line["step"] in (99, 199, 299)
    said = [
        record.getMessage() for record in caplog.records if line["message"] in record.getMessage()
    ]
    assert said == [f"step {line['step']}: {line['message']}; {line['suggestion']}"]
    measured = [line for line in lines if "health/encoder_growth" in line]
    assert measured and all("health/thresholds_without_gradient" in line for line in measured)


@pytest.mark.parametrize(
    ("fields", "l0"),
    [
        ({"target_l0": 5, "l0_coefficient": 1e-4, "jumprelu_sparsity_loss_mode": "quadratic"}, 5),
        ({"l0_coefficient": 1e-6}, WIDTH / 4),
    ],
)
def test_an_l0_that_stays_too_high_is_an_alarm(fields: dict[str, Any], l0: float) -> None:
    trainer = trained(300, **fields)
    trainer.fit()
    assert trainer.monitor is not None and set(trainer.monitor.raised) == {"L0 off target"}
    assert float(trainer.monitor.raised["L0 off target"].message.split()[2].strip(",")) > 1.25 * l0


@pytest.mark.parametrize(("l0", "alarms"), [(7, ["multiplier lost"]), (4, [])])
def test_a_multiplier_that_cannot_be_measured_is_an_alarm_above_the_target(
    l0: int, alarms: list[str]
) -> None:
    cfg = JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH, target_l0=5, jumprelu_bandwidth=0.3)
    sae = JumpReLUTrainingSAE(cfg)
    monitor, controller = Monitor.of(sae, 300), sae.control.l0
    assert controller is not None
    fired = torch.zeros(WIDTH)
    raised: list[str] = []
    for step in range(100):
        measured = 2.3 if step < 60 else -0.4
        controller.update_multiplier(torch.tensor(3.1 * measured), torch.tensor(-3.1))
        stats = StepStats(l0 * TOKENS, TOKENS, torch.tensor(1.7))
        raised += [alarm.name for alarm in monitor.step(stats, fired, step)]
    monitor.close()
    assert [name for name in raised if name == "multiplier lost"] == alarms


def test_a_run_that_goes_on_in_between_is_looked_at_at_the_same_steps() -> None:
    cfg = JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH, target_l0=5, jumprelu_bandwidth=0.3)
    monitor = Monitor.of(JumpReLUTrainingSAE(cfg), 300)
    raised = []
    for step in range(83, 131):
        error = torch.tensor(17.0 if step == 91 else 1.7)
        raised += monitor.step(StepStats(5 * TOKENS, TOKENS, error), torch.zeros(WIDTH), step)
    monitor.close()
    # Few steps say nothing of thresholds that have not moved, or of weights that are the same.
    assert [(alarm.name, alarm.step) for alarm in raised] == [("loss spike", 99)]


@pytest.mark.parametrize(("useless", "remedy"), [(0.8, "lower d_sae"), (0.3, "lower lr")])
def test_latents_that_die_for_want_of_use_are_told_from_others(useless: float, remedy: str) -> None:
    cfg = JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH, target_l0=5, jumprelu_bandwidth=0.3)
    sae = JumpReLUTrainingSAE(cfg)
    monitor, firing = Monitor.of(sae, 3_000), sae.control.firing
    assert firing is not None
    firing.useless = useless
    silent = torch.zeros(WIDTH)
    silent[::3] = 2_000
    raised = []
    for step in range(1_900, 2_000):
        stats = StepStats(5 * TOKENS, TOKENS, torch.tensor(1.7))
        raised += monitor.step(stats, silent, step)
    monitor.close()
    (dying,) = (alarm for alarm in raised if alarm.name == "latents dying")
    assert dying.suggestion.startswith(remedy)
    assert ("would add to the error" in dying.message) is (useless > 0.5)


def test_an_alarm_reaches_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    told: list[dict[str, str]] = []

    class Run:
        def alert(self, **words: str) -> None:
            told.append(words)

    monkeypatch.setattr(wandb, "run", Run())
    monkeypatch.setattr(wandb, "log", lambda *_, **__: None)
    trainer = trained(100, target_l0=5, jumprelu_bandwidth=1e-6)
    trainer.cfg.logger.log_to_wandb = True
    trainer.cfg.logger.eval_every_n_wandb_logs = 1000
    trainer.fit()
    (words,) = told
    assert words["title"] == "thresholds starved" and "jumprelu_bandwidth" in words["text"]


def test_monitoring_changes_nothing_and_ends_with_the_run() -> None:
    torch.manual_seed(3)
    watched = trained(120, target_l0=5)
    torch.manual_seed(3)
    plain = SAETrainer(watched.cfg, trained(120, target_l0=5).sae, data_provider=tokens(3))
    plain.sae.load_state_dict(watched.sae.state_dict())
    watched.fit()
    plain.fit()
    for name, value in watched.sae.state_dict().items():
        assert torch.equal(value, plain.sae.state_dict()[name]), name
    assert not watched.sae.threshold._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_the_default_recipe_on_the_embedded_model_is_healthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps, batch = 200, 256
    language_model = load_model("tiny-gemma-2")
    text = tokenized_dataset(language_model.tokenizer, 128, "train", corpus()[:100])
    sae = DEFAULT.sae_config(256, 512, target_l0=32, step_kernel="sparse")
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny-gemma-2",
        hook_name="blocks.3.hook_resid_post",
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        context_size=128,
        n_batches_in_buffer=128,
        n_batches_for_norm_estimate=7,
        exclude_special_tokens=True,
        lr=DEFAULT.learning_rate(sae, steps * batch, batch),
        lr_decay_steps=DEFAULT.lr_decay_steps(steps),
        dead_feature_window=steps // 5,
        checkpoint_path=None,
        output_path=str(tmp_path / "output"),
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = JumpReLUTrainingRunner(cfg, override_dataset=text, override_model=language_model)
    report = runner.preflight()
    assert report.findings == ()
    assert report.first is not None and report.first.l0 == pytest.approx(32, rel=0.05)
    with caplog.at_level(logging.WARNING):
        runner.run()
    monitor = runner.trainer.monitor
    assert monitor is not None and monitor.raised == {}
    assert [r.message for r in caplog.records if r.module in ("runner", "trainer")] == []
    # Far from every bar, not just below it.
    assert monitor.gauges["health/thresholds_without_gradient"] < 0.01
    assert monitor.gauges["health/dead_share"] < 0.05
    assert 0.3 < monitor.gauges["health/encoder_growth"] < 2.0
    assert monitor.gauges["health/frozen_share"] < 0.01
    assert math.isfinite(sum(monitor.gauges.values()))
