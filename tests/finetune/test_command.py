"""`jumprelu finetune`: the config that its flags make, and what it refuses in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from tests.tiny import tiny_sae


def test_the_command_mixes_four_batches_where_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []

    class Seen:
        def __init__(self, source: str, cfg: Any, **_: Any):
            configs.append(cfg)

        def run(self) -> None: ...

    monkeypatch.setattr("jumprelu_plugin.finetune.runner.FinetuningRunner", Seen)
    tiny_sae().save_model(tmp_path / "sae")
    flags = ["--context_size", "31", "--log_to_wandb", "False"]
    for more in ([], ["--n_batches_in_buffer", "3"]):
        CliRunner().invoke(app, ["finetune", str(tmp_path / "sae"), *flags, *more])
    said_nothing, three = configs
    assert said_nothing.n_batches_in_buffer == -(-4 * said_nothing.train_batch_size_tokens // 31)
    assert three.n_batches_in_buffer == 3


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (["--hook_name", "x"], "give the SAE first"),
        ([str(tmp_path / "nothing")], "there is no"),
    ):
        result = CliRunner().invoke(app, ["finetune", *arguments])
        assert result.exit_code == 2 and said in result.output.replace("\n", " ")
    tiny_sae().save_model(tmp_path / "sae")
    # Before a model is looked for: there is none of this name.
    for flag in ("--device", "--llm_device"):
        given = [str(tmp_path / "sae"), flag, "cuda:97", "--log_to_wandb", "False"]
        result = CliRunner().invoke(app, ["finetune", *given])
        assert result.exit_code == 2 and "cuda:97" in result.output, result.output
        assert len(result.output.splitlines()) < 7
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "sae"), "--nonsense", "3"])
    assert result.exit_code == 2 and "nonsense" in result.output
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "jumprelu"
