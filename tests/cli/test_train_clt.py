"""`jumprelu train-clt` passes its settings on; `evaluate` takes its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.transcoders.clt import (
    CLTConfig,
    CrossLayerTranscoder,
    load_clt,
    many_processes,
    run,
    save_clt,
)
from jumprelu_plugin.transcoders.clt.run import CLTSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_hands_over_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def note(output: Path, chosen: CLTSettings, log: Any) -> Path:
        given.append((output, chosen))
        return output

    monkeypatch.setattr(run, "train_clt", note)
    flags = "--training_tokens 99 --target-l0 7 --d_sae 59 --layers 0-2 --memory-gb 3"
    flags += " --jumprelu_sparsity_loss_mode tanh"
    arguments = ["train-clt", "--model_name", "m", "--output_path", str(tmp_path), *flags.split()]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = CLTSettings(
        model_name="m",
        training_tokens=99,
        target_l0=7.0,
        d_sae=59,
        jumprelu_sparsity_loss_mode="tanh",
        layers=(0, 1, 2),
        memory_gb=3.0,
    )
    assert given == [(tmp_path, expected)]


def test_sizes_of_a_mesh_go_to_the_training_on_many_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def note(output: Path, chosen: CLTSettings, log: Any, **sizes: int) -> Path:
        given.append((output, chosen.d_sae, sizes))
        return output

    monkeypatch.setattr(many_processes, "train_sharded_clt", note)
    sizes = ["--data_parallel_size", "2", "--model-parallel-size", "3"]
    arguments = ["train-clt", "--output_path", str(tmp_path), "--d_sae", "60", *sizes]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = {"data_parallel_size": 2, "model_parallel_size": 3}
    assert given == [(tmp_path, 60, expected)]


def test_evaluate_takes_its_folder(tmp_path: Path) -> None:
    cfg = CLTConfig(256, 256, 59, tuple(range(6)), model_name=EMBEDDED_MODEL)
    save_clt(CrossLayerTranscoder(cfg), tmp_path / "clt")
    record = tmp_path / "record.json"
    arguments = ["evaluate", str(tmp_path / "clt"), "--sequences", "2", "--context_size", "29"]
    result = CliRunner().invoke(app, [*arguments, "--output_path", str(record)])
    assert result.exit_code == 0, result.output
    found = json.loads(record.read_text())["result"]
    assert len(found["layers"]) == 6 and f"{found['delta_loss']:.4f}" in result.output


def test_a_transcoder_is_judged_on_the_model_that_it_was_trained_on(tmp_path: Path) -> None:
    recorded = {
        "model_name": "m",
        "model_class_name": "TransformerBridge",
        "dtype": "bfloat16",
        "dataset_path": "text",
        "context_size": 17,
    }
    folder = save_clt(CrossLayerTranscoder(CLTConfig(5, 7, 11, (0, 1), **recorded)), tmp_path / "x")
    choice = ModelOptions().resolve(load_clt(folder).cfg.metadata, folder)
    assert {name: getattr(choice, name) for name in recorded} == recorded
