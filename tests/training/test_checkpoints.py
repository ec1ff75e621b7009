"""A run resumed from a checkpoint is the run; a folder is whole or not there."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.control.density import TENSOR_NAME
from jumprelu_plugin.saes.checkpoint import TENSORS_FILENAME
from jumprelu_plugin.training.trainer import JumpReLUTrainer
from tests.tiny import D_MODEL, MLP, RESIDUAL
from tests.training.runs import BATCH, D_SAE, assert_same_sae, config, run, steps_logged, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- checkpoints of a run


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "none"])
def test_a_run_resumed_from_any_checkpoint_is_the_run(
    model: Any, tmp_path: Path, normalisation: str
) -> None:
    sae = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        target_l0=3,
        step_kernel="sparse",
        log_threshold=True,
        max_latent_density=0.12,
        normalize_activations=normalisation,  # type: ignore[arg-type]
    )
    short = {"sae": sae, "training_tokens": 90 * BATCH}
    cfg = config(tmp_path, n_checkpoints=4, **short)
    whole = run(model, cfg, token_rows())
    checkpoints = sorted(Path(cfg.checkpoint_path or "").iterdir(), key=lambda p: int(p.name))
    assert len(checkpoints) == 4
    for number, checkpoint in enumerate(checkpoints[::3]):
        prices = load_file(checkpoint / TENSORS_FILENAME)[TENSOR_NAME]
        assert (prices > 0).any()
        folder = tmp_path / str(number)
        again = config(folder, n_checkpoints=4, resume_from_checkpoint=str(checkpoint), **short)
        resumed = run(model, again, token_rows())
        assert_same_sae(resumed, whole)
        step = int(checkpoint.name) // BATCH
        assert steps_logged(folder / "output") == list(range(step, 90))
        # The checkpoints that were made are not made again.
        made = {path.name for path in Path(again.checkpoint_path or "").glob("*")}
        assert made == {c.name for c in checkpoints if int(c.name) > int(checkpoint.name)}


@pytest.mark.parametrize("normalization", ["layer_norm", "covariance_whitening"])
def test_a_run_is_looked_at_and_trained_with_every_normalization(
    model: Any, tmp_path: Path, normalization: Any
) -> None:
    sae = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        target_l0=7,
        normalize_activations=normalization,
        step_kernel="sparse",
    )
    looked_at, not_looked_at = (
        run(
            model,
            config(tmp_path / str(look), sae=sae, training_tokens=30 * BATCH, lr_decay_steps=10),
            token_rows(),
            check_first=look,
        )
        for look in (True, False)
    )
    assert_same_sae(looked_at, not_looked_at)


def test_the_end_of_a_run_is_not_resumed(model: Any, tmp_path: Path) -> None:
    """Its weights are folded; resuming would scale the activations and fold the weights again."""
    cfg = config(tmp_path, save_final_checkpoint=True, training_tokens=40 * BATCH)
    run(model, cfg, token_rows())
    (final,) = Path(cfg.checkpoint_path or "").glob("final_*")
    longer = config(tmp_path / "on", training_tokens=50 * BATCH, resume_from_checkpoint=str(final))
    with pytest.raises(ValueError, match=r"normalized as 'none'.*jumprelu finetune"):
        run(model, longer, token_rows())
    from_it = config(tmp_path / "from", from_pretrained_path=str(final))
    with pytest.raises(ValueError, match=r"normalized as 'none'.*jumprelu finetune"):
        run(model, from_it, token_rows())
    assert not (tmp_path / "on").exists() and not (tmp_path / "from").exists()


def test_a_run_from_pretrained_weights_trains_for_its_own_target(
    model: Any, tmp_path: Path
) -> None:
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=100 * BATCH)  # for L0 7
    run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, target_l0=3, step_kernel="sparse")
    other = config(
        tmp_path / "other",
        sae=sae,
        from_pretrained_path=str(checkpoint),
        training_tokens=200 * BATCH,
    )
    trained = run(model, other, token_rows())
    assert trained.sae.cfg.target_l0 == trained.sae.control.l0.target == 3  # type: ignore[union-attr]
    assert trained.sae.cfg.metadata.l0 == pytest.approx(3, rel=0.1)


@pytest.fixture(scope="module")
def half_way(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the middle of a run of the config of `tests.training.runs`."""
    cfg = config(tmp_path_factory.mktemp("run"), n_checkpoints=1, training_tokens=20 * BATCH)
    run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    return checkpoint


def learning_rates(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "output" / "metrics.jsonl").read_text().splitlines())
    rate = "details/current_learning_rate"
    return {line["step"]: line[rate] for line in lines if rate in line}


@pytest.mark.parametrize(
    "changes",
    [
        {"training_tokens": 37 * BATCH},
        {"training_tokens": 37 * BATCH, "lr_decay_steps": 0},
        {"lr": 1e-4},
        {"lr_warm_up_steps": 13},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 1e-4},
        {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 3},
    ],
)
def test_a_run_resumed_with_another_schedule_follows_its_own(
    model: Any,
    half_way: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = {"training_tokens": 23 * BATCH, "lr_decay_steps": 7, **changes}
    run(model, config(tmp_path / "whole", **changes), token_rows())
    other = config(tmp_path / "on", resume_from_checkpoint=str(half_way), **changes)
    step = int(half_way.name) // BATCH
    with caplog.at_level("WARNING"):
        resumed = run(model, other, token_rows())
    assert f"another config; from step {step} on they follow this run's schedule" in caplog.text
    steps = changes["training_tokens"] // BATCH
    wanted = learning_rates(tmp_path / "whole")
    assert learning_rates(tmp_path / "on") == {at: wanted[at] for at in range(step, steps)}
    assert wanted[step] > 0
    (group,) = resumed.trainer.optimizer.param_groups
    assert group["initial_lr"] == other.lr


def test_a_run_resumed_with_the_same_schedule_says_nothing_of_it(
    model: Any, half_way: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The constant schedule does not read lr_end.
    given = {"training_tokens": 20 * BATCH, "lr_end": 3e-3, "adam_beta1": 0.7}
    cfg = config(tmp_path, resume_from_checkpoint=str(half_way), **given)
    with caplog.at_level("WARNING"):
        resumed = run(model, cfg, token_rows())
    assert "schedule (lr" not in caplog.text
    (group,) = resumed.trainer.optimizer.param_groups
    assert group["betas"] == (0.7, cfg.adam_beta2)


@pytest.mark.parametrize("way", ["from_pretrained_path", "resume_from_checkpoint"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input True and this run False"),
        ({"log_threshold": True}, "log_threshold False and this run True"),
        ({"hyperparameter_units": "unit_rms"}, "units 'sqrt_d' and this run 'unit_rms'"),
        ({"jumprelu_bandwidth": 0.3}, "jumprelu_bandwidth None and this run 0.3"),
        ({"max_latent_density": 0.4}, "max_latent_density .1: no limit. 1.0 and this run 0.4"),
        ({"target_l0": None, "l0_coefficient": 0.1}, "standardize_activations .*True and.*False"),
        ({"normalize_activations": "none"}, "give this run normalize_activations='expected_"),
    ],
)
def test_a_run_whose_weights_would_mean_something_else_is_refused(
    model: Any, half_way: Path, tmp_path: Path, way: str, changes: dict[str, Any], words: str
) -> None:
    """Stored log θ would be taken for θ, and a bias of centered inputs for one of raw inputs."""
    fields = {"d_in": D_MODEL, "d_sae": D_SAE, "target_l0": 7, "step_kernel": "sparse"}
    sae = JumpReLUTrainingSAEConfig(**{**fields, **changes})
    cfg = config(tmp_path, sae=sae, training_tokens=30 * BATCH, **{way: str(half_way)})
    with pytest.raises(ValueError, match=words):
        run(model, cfg, token_rows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hook_name": MLP}, f"hook_name '{RESIDUAL}' and this run '{MLP}'"),
        ({"context_size": 11}, "context_size 13 and this run 11"),
        ({"seqpos_slice": (2, None)}, r"seqpos_slice \[None\] and this run \[2, None\]"),
        ({"prepend_bos": False}, "prepend_bos True and this run False"),
        ({"exclude_special_tokens": [5]}, r"exclude_special_tokens True and this run \[5\]"),
        ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "kwargs .* and this run .*fold_ln"),
    ],
)
def test_a_run_on_other_activations_is_refused(
    model: Any, half_way: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """Of the same width, they would be trained on without a word."""
    more = {"training_tokens": 30 * BATCH, "resume_from_checkpoint": str(half_way)}
    with pytest.raises(ValueError, match=words + ".*resume with the config the run started with"):
        run(model, config(tmp_path, **more, **changes), token_rows())
    assert not list(tmp_path.iterdir())


def test_a_model_that_moved_is_told_of(
    model: Any, half_way: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"training_tokens": 30 * BATCH, "resume_from_checkpoint": str(half_way)}
    with caplog.at_level("WARNING"):
        resumed = run(model, config(tmp_path, model_name="moved", **more), token_rows())
    assert resumed.trainer.n_training_samples == 30 * BATCH
    assert "model_name 'tiny' and this run 'moved'" in caplog.text


def test_a_checkpoint_without_the_buffer_is_smaller_and_resumes(model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=60 * BATCH)
    run(model, cfg, token_rows(), save_buffer=False)
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    state = load_file(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)
    assert not {"waiting", "serving"} & set(state)
    assert int(state["sequences_read"]) > 0
    again = config(
        tmp_path / "b", training_tokens=60 * BATCH, resume_from_checkpoint=str(checkpoint)
    )
    assert run(model, again, token_rows()).trainer.n_training_samples == 60 * BATCH


def test_a_checkpoint_of_a_longer_text_is_refused(model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=40 * BATCH)
    run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    again = config(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"sequences into the text.* 6: give the dataset"):
        run(model, again, token_rows(6))
    assert not (tmp_path / "b").exists()


def test_checkpoints_are_exchanged_with_saelens_own_runner(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # its handlers would outlive the test
    steps = {"training_tokens": 60 * BATCH}

    def theirs(cfg: Any) -> Any:
        return LanguageModelSAETrainingRunner(cfg, token_rows(), model).run()

    def ours(cfg: Any) -> Any:
        return run(model, cfg, token_rows()).sae

    for name, first, second in (("a", theirs, ours), ("b", ours, theirs)):
        first(config(tmp_path / name, n_checkpoints=1, **steps))
        (checkpoint,) = (tmp_path / name / "checkpoints").glob("*/*")
        again = config(tmp_path / name / "again", resume_from_checkpoint=str(checkpoint), **steps)
        assert second(again).W_dec.isfinite().all()
        assert (tmp_path / name / "again" / "output" / "cfg.json").exists()


def test_a_prefetching_run_is_the_same_run_also_resumed(model: Any, tmp_path: Path) -> None:
    steps = {"training_tokens": 60 * BATCH, "n_checkpoints": 1}
    plain = run(model, config(tmp_path / "plain", **steps), token_rows())
    cfg = config(tmp_path, prefetch_llm_batches=2, **steps)
    ahead = run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    again = config(
        tmp_path / "again",
        resume_from_checkpoint=str(checkpoint),
        **{**steps, "n_checkpoints": 0, "prefetch_llm_batches": 3},
    )
    resumed = run(model, again, token_rows())
    assert resumed.trainer.n_training_samples == 60 * BATCH
    for name, value in plain.sae.state_dict().items():
        assert torch.equal(ahead.sae.state_dict()[name], value), name
        assert torch.equal(resumed.sae.state_dict()[name], value), name
    for folder, asked in ((tmp_path, 2), (tmp_path / "again", 3)):
        recorded = json.loads((folder / "output" / "runner_cfg.json").read_text())
        assert recorded["prefetch_llm_batches"] == asked


# ---------------------------------------------------------------- whole, or not there


def failing(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("last_written", ["save_to_checkpoint", "save_trainer_state"])
def test_a_checkpoint_that_cannot_be_finished_is_not_there_and_the_run_goes_on(
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    last_written: str,
) -> None:
    owner = ActivationsStore if last_written == "save_to_checkpoint" else JumpReLUTrainer
    written, save = [], getattr(owner, last_written)

    def second_fails(self: Any, folder: Path) -> None:
        written.append(folder)
        failing() if len(written) == 2 else save(self, folder)

    monkeypatch.setattr(owner, last_written, second_fails)
    cfg = config(tmp_path, n_checkpoints=3, save_final_checkpoint=True, training_tokens=20 * BATCH)
    with caplog.at_level("WARNING"):
        run(model, cfg, token_rows())
    names = sorted(path.name for path in Path(cfg.checkpoint_path or "").iterdir())
    assert names == ["186", "496", "final_620"]
    (said,) = (m for r in caplog.records if "no space left" in (m := r.getMessage()))
    assert "341 could not be saved: no space left" in said and "/186, is kept. Training go" in said
    assert (tmp_path / "output" / "cfg.json").exists()


def test_an_output_folder_that_cannot_be_finished_is_not_an_sae(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, training_tokens=10 * BATCH)
    with monkeypatch.context() as patch:
        # The last thing SAELens writes there; weights and config are on the disk by then.
        patch.setattr("sae_lens.llm_sae_training_runner.json.dump", failing)
        with pytest.raises(OSError, match=r"training is finished.*no space.*from the beginning"):
            run(model, cfg, token_rows())
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["metrics.jsonl"]
    # So the same command can be given again.
    run(model, cfg, token_rows())
    assert steps_logged(tmp_path / "output") == list(range(10))
