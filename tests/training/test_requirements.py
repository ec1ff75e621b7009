"""What a run needs is asked before anything is computed, and local text is read as it is."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models import language_models, text
from jumprelu_plugin.training import runner
from jumprelu_plugin.training.multi.runner import JumpReLUMultiTrainingRunner
from jumprelu_plugin.training.text_source import one_split
from tests.tiny import BOS, VOCABULARY, tiny_tokens
from tests.training.folders import flags
from tests.training.runs import config, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: the refusal is to come first."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runner, "language_model", refuse)
    monkeypatch.setattr(language_models, "load_model", refuse)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda"}, ["device is 'cuda'", "no CUDA device", "cpu"]),
        ({"device": "mps"}, ["device is 'mps'", "no MPS device", "cpu"]),
        ({"device": "gpu"}, ["device is 'gpu'", "cpu, cuda"]),
        ({"device": "xpu"}, ["device is 'xpu'", "this PyTorch", "cpu, cuda"]),
        ({"device": "meta"}, ["device is 'meta'", "this PyTorch", "cpu, cuda"]),
        ({"train_batch_size_tokens": 0}, ["train_batch_size_tokens is 0; give at least 1"]),
        ({"training_tokens": -31}, ["training_tokens is -31; give at least 1"]),
        ({"n_batches_for_norm_estimate": 0}, ["n_batches_for_norm_estimate is 0; give at least"]),
        ({"feature_sampling_window": 0}, ["feature_sampling_window is 0; give at least 1"]),
        ({"n_checkpoints": -1}, ["n_checkpoints is -1; give at least 0"]),
        ({"wandb_log_frequency": 0}, ["wandb_log_frequency is 0; give at least 1"]),
        ({"d_in": 0}, ["d_in is 0; give at least 1"]),
        ({"lr": "nan"}, ["lr is nan; give a number above 0"]),
        ({"log_to_wandb": True, "n_eval_batches": 0}, ["n_eval_batches is 0; give at least 1"]),
        ({"adam_beta2": 1}, ["adam_beta2 is 1.0; give at least 0 and below 1"]),
        ({"lr_scheduler_name": "cosine"}, ["'cosine'", "cosineannealing"]),
        ({"n_restart_cycles": 3}, ["n_restart_cycles is 3", "cosineannealingwarmrestarts"]),
        ({"activations_mixing_fraction": 1.5}, ["activations_mixing_fraction is 1.5; give 0 to 1"]),
        (
            {"train_batch_size_tokens": 389, "n_batches_in_buffer": 11, "context_size": 23},
            ["buffer holds 253 rows", "one batch takes 389: give n_batches_in_buffer=17 or more"],
        ),
        ({"eval_batch_size_prompts": 0}, ["eval_batch_size_prompts is 0; give at least 1"]),
        (
            {"n_checkpoints": 3, "checkpoint_path": "None"},
            ["n_checkpoints is 3 and has no effect", "give checkpoint_path"],
        ),
        (
            {"save_final_checkpoint": True, "checkpoint_path": "none"},
            ["save_final_checkpoint is True and has no effect", "give checkpoint_path"],
        ),
        ({"cached_activations_path": "there"}, ["has no effect", "use_cached_activations"]),
        ({"llm_compilation_mode": "default"}, ["has no effect", "set compile_llm"]),
        (
            {
                "architecture": "standard",
                "target_l0": None,
                "l1_coefficient": 3,
                "sae_compilation_mode": "default",
            },
            ["has no effect", "set compile_sae"],
        ),
        (
            {"compile_sae": True},
            ["compile_sae is True", "own kernels", "leave it out", "step_kernel='auto'"],
        ),
        ({"sae_compilation_mode": "default"}, ["sae_compilation_mode is 'default'", "leave it"]),
        ({"llm_device": "gpu"}, ["device is 'gpu'", "cpu, cuda"]),
        ({"sae.device": "cuda"}, ["--sae.device", "device is 'cuda'", "finds no"]),
        ({"seqpos_slice": "1,None,2,3"}, ["seqpos_slice", "4 parts; give start,stop"]),
        (
            {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 5},
            ["n_restart_cycles is 5", "leave 3 of", "give at most 3"],
        ),
        (
            {
                "lr_scheduler_name": "cosineannealingwarmrestarts",
                "n_restart_cycles": 2,
                "lr_warm_up_steps": 2,
            },
            ["n_restart_cycles is 2", "leave 1 of", "give at most 1"],
        ),
        (
            {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 3},
            ["lr_warm_up_steps 3 and lr_decay_steps 0", "no step", "lower them"],
        ),
        (
            {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 2, "lr_end": 0},
            ["lr_decay_steps is 2 and lr_end is 0", "Set lr_decay_steps=0"],
        ),
        ({"reshape_activations": "hook_z"}, ["'hook_z', which flattens", "leave it 'none'"]),
        ({"log_to_wandb": True}, ["wandb login", "WANDB_MODE=offline", "--log_to_wandb False"]),
    ],
)
def test_what_a_run_lacks_is_said_before_a_model_is_loaded(
    changes: dict[str, Any],
    words: list[str],
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.api.default_settings", {}, raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    if "cuda" in changes.values():
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["train", *flags(folders, tmp_path, **changes)])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert all(word in said for word in words), said
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_decay_steps": 2, "lr_end": 0},  # the constant schedule reads no end
        {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 3},
        {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 2, "lr_end": 1e-5},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 0},
        {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 1, "lr_decay_steps": 2},
        {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 7, "lr_decay_steps": 11},
        {"seqpos_slice": "1,None,2"},
        {"model_kwargs": '{{"start_at_layer": null}}'},
    ],
    ids=str,
)
def test_what_a_run_can_do_is_not_refused(
    changes: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["train", *flags(folders, tmp_path, **changes)])
    assert result.exit_code == 0, result.output


def test_the_demo_text_begins_as_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [text.Document(f"c/{number}", "w5 w9 " * 23) for number in range(31)]
    monkeypatch.setattr(text, "corpus", lambda: documents)
    for prepend_bos in (True, False):
        cfg = config(Path(), dataset_path="", prepend_bos=prepend_bos)
        rows = torch.tensor(runner.own_text(cfg, model)["tokens"])
        assert rows.shape[1] == 13 and len(rows) > 5
        assert ((rows[:, 0] == BOS) == prepend_bos).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"disable_concat_sequences": True}, "disable_concat_sequences is True.*set it to False"),
        ({"sequence_separator_token": None}, "sequence_separator_token is None.*set it to 'bos'"),
    ],
)
def test_what_rows_of_tokens_cannot_heed_is_refused(
    fields: dict[str, Any], words: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        runner.JumpReLUTrainingRunner(config(tmp_path, **fields), token_rows(), model)
    with pytest.raises(ValueError, match=words):
        JumpReLUMultiTrainingRunner({"a": config(tmp_path, **fields)}, token_rows(), model)


def test_rows_tokenized_for_another_model_are_refused(model: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"tokens": [[BOS] + [VOCABULARY + 4] * 12] * 37})
    said = f"tokens {BOS} to {VOCABULARY + 4}.*has {VOCABULARY} tokens"
    with pytest.raises(ValueError, match=said):
        runner.JumpReLUTrainingRunner(config(tmp_path), rows, model)


@pytest.mark.parametrize("begins", [True, False])
def test_rows_that_begin_otherwise_are_told_of(
    begins: bool, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for says in (True, False):
        caplog.clear()
        first = [BOS] if begins else [7]
        rows = Dataset.from_dict({"tokens": [[*first, *range(5, 17)]] * 37})
        with caplog.at_level("WARNING"):
            runner.JumpReLUTrainingRunner(config(tmp_path, prepend_bos=says), rows, model)
        assert (f"set prepend_bos={begins}" in caplog.text) == (says != begins)


def pretokenized(rows: int = 97) -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(rows, 13).tolist()})


@pytest.mark.parametrize("how", ["save_to_disk", "DatasetDict", "parquet"])
def test_a_local_dataset_of_any_kind_trains(how: str, folders: Path, tmp_path: Path) -> None:
    place = tmp_path / "data"
    if how == "save_to_disk":
        pretokenized().save_to_disk(place)
    elif how == "DatasetDict":
        DatasetDict(train=pretokenized(), test=pretokenized(5)).save_to_disk(place)
    else:
        place.mkdir()
        pretokenized().to_parquet(place / "train.parquet")
    given = flags(folders, tmp_path, dataset_path=place)
    result = CliRunner().invoke(app, ["train", *given])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "output" / "cfg.json").is_file()


def test_a_dataset_dict_without_a_training_split_names_its_splits() -> None:
    with pytest.raises(ValueError, match=r"splits test, dev.*dataset\['test'\]"):
        one_split(DatasetDict(test=pretokenized(3), dev=pretokenized(3)))


def test_a_run_is_quiet_about_how_saelens_reads_text(
    folders: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        result = CliRunner().invoke(app, ["train", *flags(folders, tmp_path)])
    assert result.exit_code == 0, result.output
    assert "trust_remote_code" not in caplog.text + result.output
    said = " ".join(str(warning.message) for warning in warned)
    assert "copy construct" not in said and "fewer samples" not in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["train-transcoders", "train-clt"])
def test_a_run_over_layers_asks_for_its_device_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    output = tmp_path / "out"
    given = ["--model_name", "tiny-gemma-2", "--output_path", str(output), "--device", "cuda"]
    result = CliRunner().invoke(app, [command, *given])
    assert result.exit_code == 2 and "no CUDA device" in " ".join(result.output.split())
    assert not output.exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("train-transcoders --training_tokens 0", "training_tokens is 0; give at least 1"),
        ("train-transcoders --lr 0", "lr is 0.0; give a number above 0"),
        ("train-transcoders --context_size 0", "context_size is 0; give at least 2"),
        ("train-clt --lr nan", "lr is nan; give a number above 0"),
        ("train-clt --d_sae -7", "d_sae is -7; give at least 1"),
        ("train-clt --memory_gb 0", "memory_gb is 0.0; give a number above 0"),
        ("cache-activations --hook_names h --context_size 1", "context_size is 1; give at least 2"),
        (
            "cache-activations --hook_names h --store_batch_size_prompts 0",
            "store_batch_size_prompts is 0; give at least 1",
        ),
    ],
)
def test_other_runs_ask_for_possible_numbers_first(given: str, words: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = CliRunner().invoke(app, [*given.split(), "--output_path", str(output)])
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
    assert not output.exists()
