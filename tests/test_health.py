"""The look before a run and the alarms in it: closed forms, stock SAELens, and real runs."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from test_bad_input import files, flags, folders, wide_terminal  # noqa: F401
from test_resume import BATCH, CONTEXT, D_SAE, config, model, run, token_rows  # noqa: F401
from test_whole_run import BATCH as TOKENS
from test_whole_run import D_IN, tokens
from test_whole_run import D_SAE as WIDTH
from tiny import D_MODEL, MLP
from typer.testing import CliRunner

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import corpus, tokenized_dataset
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.training.health.findings import lost_share
from jumprelu_plugin.training.health.first_step import DOMINANCE, first_step, threshold_reach
from jumprelu_plugin.training.health.schedule import lr_sum, repaired
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from jumprelu_plugin.training.trainer import JumpReLUTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")
NORMAL = NormalDist()


# ---------------------------------------------------------------- the first step


def gaussian(d_in: int = 31, rows: int = 2003) -> torch.Tensor:
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(11))


def gaussian_sae(**fields: Any) -> JumpReLUTrainingSAE:
    """Unit encoders, so that every pre-activation of `gaussian` is a standard normal number."""
    given = {"d_in": 31, "d_sae": 997, "unit_norm_decoder": True, "l0_coefficient": 0.1, **fields}
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**given))


def test_windows_and_l0_are_the_gaussians() -> None:
    theta, width, lr_total = 1.3, 0.21, 0.17
    sae = gaussian_sae(jumprelu_init_threshold=theta, jumprelu_bandwidth=width, target_l0=23.0)
    found = first_step(sae, gaussian(), lr_total, steps=100)

    def active(t: float) -> float:
        return 997 * (1 - NORMAL.cdf(t))

    inside = NORMAL.cdf(theta + width / 2) - NORMAL.cdf(theta - width / 2)
    assert found.spread == pytest.approx(1.0, rel=0.02)
    assert found.occupancy == pytest.approx(inside, rel=0.03)
    assert found.median_occupancy == pytest.approx(inside, rel=0.05)
    assert found.entries == pytest.approx(active(theta - width / 2), rel=0.03)
    assert found.l0 == pytest.approx(active(theta), rel=0.03)
    assert found.most_l0 == pytest.approx(997 / 2, rel=0.02)
    low, high = found.l0_in_reach
    assert low == pytest.approx(active(theta + lr_total), rel=0.03)
    assert high == pytest.approx(active(theta - lr_total), rel=0.03)
    wanted = NORMAL.inv_cdf(1 - 23.0 / 997) - theta
    assert found.target_shift == pytest.approx(wanted, rel=0.02)
    assert found.variance == pytest.approx(31, rel=0.02)
    assert found.rounding == 0.0


def test_a_calibrated_start_is_on_target_and_the_sae_is_left_alone() -> None:
    sae = gaussian_sae(l0_coefficient=None, target_l0=19.0)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    found = first_step(sae, gaussian(), 0.1, steps=100)
    assert found.l0 == pytest.approx(19.0, rel=0.1)
    assert abs(found.target_shift or 0.0) < 0.05
    assert found.bandwidth == pytest.approx(1.0, rel=0.02)
    assert sae.bandwidth is None and sae.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_rounding_of_a_half_precision_sae_is_what_rounding_does() -> None:
    fields = {"jumprelu_init_threshold": 1.3, "jumprelu_bandwidth": 0.21}
    found = first_step(gaussian_sae(dtype="bfloat16", **fields), gaussian(), 0.1, 100)
    # Rounding to 8 bits: uniform within half a spacing of 2^(e-7); over a normal number's binades.
    x = gaussian()
    spacing = 2.0 ** (x.abs().log2().floor() - 7)
    expected = (spacing.square() / 12).mean().sqrt() * 31**0.5 * (1 / 31**0.5)
    assert found.rounding == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize("coefficient", [1e-6, 0.02, 40.0])
def test_the_pulls_are_those_of_stock_saelens(coefficient: float) -> None:
    fields = {
        "d_in": 31,
        "d_sae": 127,
        "normalize_activations": "none",
        "jumprelu_init_threshold": 0.13,
        "jumprelu_bandwidth": 0.11,
        "l0_coefficient": coefficient,
    }
    stock = StockSAE(sae_lens.JumpReLUTrainingSAEConfig(**fields))  # type: ignore[arg-type]
    ours = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**fields, jumprelu_ste_to_input=False))
    ours.load_state_dict(stock.state_dict())
    rows = gaussian()
    pulls = {}
    for c in (0.0, 1.0):
        stock.zero_grad()
        stock.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=rows,
                dead_neuron_mask=None,
                coefficients={"l0": c},
                n_training_steps=0,
                is_logging_step=False,
            )
        ).loss.backward()
        assert stock.threshold.grad is not None
        pulls[c] = stock.threshold.grad.double()
    error, penalty = pulls[0.0], coefficient * (pulls[1.0] - pulls[0.0])
    found = first_step(ours, rows, 0.1, 100)
    assert found.tokens == len(rows)
    expected = [(a.abs() > DOMINANCE * b.abs()).float().mean() for a, b in
                ((penalty, error), (error, penalty))]  # fmt: skip
    assert found.penalty_dominates == pytest.approx(expected[0].item(), abs=0.02)
    assert found.error_dominates == pytest.approx(expected[1].item(), abs=0.02)
    assert (found.penalty_dominates == 1.0) == (coefficient == 40.0)
    assert (found.error_dominates or 0.0) > 0.9 or coefficient > 1e-6


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


STEPS, LR = 90, 1e-3


def stock_settings(parameter: str = "raw", **changes: Any) -> JumpReLUTrainingSAE:
    """SAELens' own numbers; its coefficient is 1."""
    stock = sae_lens.JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=WIDTH)
    names = ("jumprelu_init_threshold", "jumprelu_bandwidth", "decoder_init_norm",
             "jumprelu_ste_to_input", "normalize_activations", "l0_coefficient")  # fmt: skip
    fields = {name: getattr(stock, name) for name in names} | changes
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(D_IN, WIDTH, log_threshold=parameter == "log", **fields)  # type: ignore[arg-type]
    )


def rise(sae: JumpReLUTrainingSAE) -> float:
    """How far the median threshold moves in a run by SAELens' own trainer."""
    start = sae.threshold.detach().clone()
    cfg = SAETrainerConfig(total_training_samples=STEPS * TOKENS, train_batch_size_samples=TOKENS,
                           lr=LR, lr_end=LR)  # fmt: skip
    SAETrainer(cfg, sae, data_provider=tokens(3)).fit()
    return (sae.threshold.detach() - start).median().item()


@pytest.mark.parametrize("parameter", ["raw", "log"])
def test_thresholds_travel_as_far_as_predicted_in_a_run_of_stock_settings(parameter: str) -> None:
    sae = stock_settings(parameter)
    assert sae.bandwidth is not None
    reach = threshold_reach(sae, sae.threshold.median().item(), sae.bandwidth, STEPS * LR, STEPS)
    # Adam takes steps below lr while gradients shrink, as they do where the encoder grows.
    assert 0.6 * reach.up < rise(sae) < 1.02 * reach.up
    assert reach.shift == 0.0


def test_a_coefficient_that_outweighs_the_error_is_saturated() -> None:
    """Tenfold changes the thresholds' way where it does not outweigh, and not where it does."""
    rows = next(tokens(3))
    ways = {}
    for coefficient in (0.001, 0.01, 1.0, 10.0):
        torch.manual_seed(0)
        sae = stock_settings(l0_coefficient=coefficient)
        found = first_step(sae, rows, STEPS * LR, STEPS)
        ways[coefficient] = rise(sae), found.penalty_dominates or 0.0
    assert ways[1.0][1] > 0.95 and ways[0.001][1] < 0.5
    assert ways[10.0][0] == pytest.approx(ways[1.0][0], rel=0.01)
    assert abs(ways[0.01][0] / ways[0.001][0] - 1) > 0.1


def test_bfloat16_loses_the_steps_that_are_below_half_its_spacing() -> None:
    weights = torch.tensor([0.031, 0.062, 0.26, -0.51, 1.1], dtype=torch.bfloat16)
    # Spacings 2^-13, 2^-12, 2^-9, 2^-8, 2^-7: a step of 1e-3 is half the spacing of 2^-9 or more.
    assert lost_share(weights, 1e-3) == pytest.approx(2 / 5)
    assert lost_share(weights.float(), 1e-3) == 0.0


# ---------------------------------------------------------------- what is refused, and repaired

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an empty window": (
        {"jumprelu_bandwidth": 1e-9},
        ["gradient from", "tokens in the whole run", "set jumprelu_bandwidth="],
    ),
    "a coefficient above the variance": (
        {"target_l0": None, "l0_coefficient": 5000.0},
        ["l0_coefficient is 5000", "the least loss is at L0 0", "give target_l0"],
    ),
    "a target above what the data gives": (
        {"target_l0": 40},
        ["target_l0 is 40", "latents are active", "set target_l0 below"],
    ),
    "less than a batch": (
        {"training_tokens": 23},
        ["training_tokens is 23", "one batch of 31", "raise training_tokens"],
    ),
    "bfloat16 weights that cannot move": (
        {"sae.dtype": "bfloat16", "lr": 1e-6},
        ["bfloat16", "lost in rounding", "--sae.dtype"],
    ),
    "more memory than there is": (
        {"n_batches_in_buffer": 10**11},
        ["GB on cpu at its peak", "GB can be had", "n_batches_in_buffer"],
    ),
}


@pytest.mark.parametrize("way", ["python", "train", "check"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_run_that_cannot_do_what_it_is_for_is_refused(
    what: str,
    way: str,
    folders: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes, words = REFUSED[what]
    given = flags(folders, tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    before = files(folders, tmp_path)
    if way == "python":
        runner = JumpReLUTrainingRunner(parse_flags(["--architecture", "jumprelu", *given]))
        with pytest.raises(ValueError) as refusal:
            runner.run()
        message = str(refusal.value)
    else:
        result = CliRunner().invoke(app, [way, *given])
        assert result.exit_code == 2, result.output
        message = " ".join(result.output.split())
        assert "Traceback" not in message
    for word in words:
        assert word in message
    assert files(folders, tmp_path) == before


def test_a_run_that_works_is_shown_and_nothing_is_written(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(folders, tmp_path)
    result = CliRunner().invoke(app, ["check", *flags(folders, tmp_path)])
    assert result.exit_code == 0, result.output
    for word in (
        "peak memory",
        "L0 at the start",
        "window",
        "can move",
        "dead_feature_window",
    ):
        assert word in result.output
    # What the optional fields mean in this run.
    for field in ("controls_l0", "matryoshka_widths", "unit_norm_decoder", "max_latent_density"):
        assert field in result.output
    assert "from the first batch" in result.output
    assert files(folders, tmp_path) == before


def test_a_refusal_can_be_overruled(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    given = flags(folders, tmp_path, jumprelu_bandwidth=1e-9)
    result = CliRunner().invoke(app, ["train", "--no_check_first", *given])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "output" / "cfg.json").exists()


def test_schedules_that_do_not_fit_are_shortened_and_said_so(
    model: Any,  # noqa: F811
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


def test_a_checked_run_is_the_run(model: Any, tmp_path: Path) -> None:  # noqa: F811
    checked, plain = (
        run(model, config(tmp_path / str(check), training_tokens=70 * BATCH), token_rows(),
            check_first=check)
        for check in (True, False)
    )  # fmt: skip
    for name, value in checked.sae.state_dict().items():
        assert torch.equal(value, plain.sae.state_dict()[name]), name


def test_a_transcoder_is_looked_at_on_both_sides(model: Any, tmp_path: Path) -> None:  # noqa: F811
    sae = JumpReLUTrainingTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=D_SAE, target_l0=7,
                                           hook_name_out=MLP)  # fmt: skip
    cfg = config(tmp_path, sae=sae, hook_name="blocks.1.ln2.hook_normalized")
    runner = JumpReLUTrainingRunner(cfg, override_dataset=token_rows(), override_model=model)
    random = torch.get_rng_state()
    report = runner.preflight()
    assert torch.equal(torch.get_rng_state(), random)
    assert report.first is not None and report.first.l0 == pytest.approx(7, rel=0.15)
    # E‖y‖² is scaled to d_in, its mean's part is no variance.
    assert 0.2 * D_MODEL < report.first.variance < D_MODEL
    assert not report.of("refused")


# ---------------------------------------------------------------- memory

MEASURE = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_health import memory_run
memory_run(Path(sys.argv[1]), json.loads(sys.argv[3]))
"""


def memory_run(folder: Path, changes: dict[str, Any]) -> None:
    """In a process of its own: predict, train, print both."""
    from tiny import tiny_hf, tiny_hooked, tiny_tokenizer

    torch.set_num_threads(1)
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, target_l0=7, **changes.pop("sae"))
    cfg = config(folder, sae=sae, checkpoint_path=None, output_path=None,
                 lr_decay_steps=0, **changes)  # fmt: skip
    language_model = tiny_hooked(tiny_hf(), tiny_tokenizer(folder / "tokenizer"))
    runner = JumpReLUTrainingRunner(
        cfg, override_dataset=token_rows(997), override_model=language_model, check_first=False
    )
    memory = runner.preflight().memory
    assert memory is not None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    runner.run()
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps([memory.moment, memory.peak - memory.there, peak - memory.there]))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
@pytest.mark.parametrize(
    ("moment", "changes"),
    [
        (
            "step",
            {"sae": {"d_sae": 16381, "step_kernel": "dense"}, "train_batch_size_tokens": 601,
             "training_tokens": 3 * 601, "n_batches_in_buffer": 211},
        ),
        (
            "drawing",
            {"sae": {"d_sae": 499, "step_kernel": "sparse"}, "train_batch_size_tokens": 4001,
             "training_tokens": 60 * 4001, "n_batches_in_buffer": 53 * 499,
             "store_batch_size_prompts": 499},
        ),
    ],
)  # fmt: skip
def test_peak_memory_is_what_a_run_takes(
    moment: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    script = [sys.executable, "-c", MEASURE, str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*script, json.dumps(changes)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert found == moment
    assert measured > 100e6  # there is something to predict
    assert measured / 1.3 < predicted < 1.3 * measured


# ---------------------------------------------------------------- alarms


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
def test_a_sick_run_raises_its_alarm_once_and_says_what_to_change(
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


def test_watching_changes_nothing_and_ends_with_the_run() -> None:
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
    steps, batch = 300, 256
    language_model = load_model("tiny-gemma-2")
    text = tokenized_dataset(language_model.tokenizer, 128, "train", corpus()[:100])
    cfg = LanguageModelSAERunnerConfig(
        sae=DEFAULT.sae_config(256, 512, target_l0=32, step_kernel="sparse"),
        model_name="tiny-gemma-2",
        hook_name="blocks.3.hook_resid_post",
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        context_size=128,
        n_batches_in_buffer=128,
        n_batches_for_norm_estimate=20,
        exclude_special_tokens=True,
        lr=DEFAULT.runner["lr"],
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
