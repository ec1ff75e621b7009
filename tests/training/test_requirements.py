"""What a run needs is asked before anything is computed, and local text is read as it is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models import language_models
from jumprelu_plugin.training import runner
from jumprelu_plugin.training.text_source import one_split
from tests.tiny import tiny_tokens
from tests.training.folders import flags

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
        ({"adam_beta2": 1}, ["adam_beta2 is 1.0; give at least 0 and below 1"]),
        ({"lr_scheduler_name": "cosine"}, ["'cosine'", "cosineannealing"]),
        ({"n_restart_cycles": 3}, ["n_restart_cycles is 3", "cosineannealingwarmrestarts"]),
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
    if "device" in changes and changes["device"] == "cuda":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["train", *flags(folders, tmp_path, **changes)])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert all(word in said for word in words), said
    assert not (tmp_path / "output").exists()


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


def test_a_run_says_nothing_of_remote_code(
    folders: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        result = CliRunner().invoke(app, ["train", *flags(folders, tmp_path)])
    assert result.exit_code == 0, result.output
    assert "trust_remote_code" not in caplog.text + result.output


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
