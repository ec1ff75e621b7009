"""`jumprelu train-transcoders` passes its settings on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.transcoders.per_layer import run as transcoder_set
from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings


def test_the_command_hands_over_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def run(output: Path, chosen: TranscoderSettings, log: Any) -> Path:
        given.append((output, chosen))
        return output

    monkeypatch.setattr(transcoder_set, "train_transcoders", run)
    flags = (
        "--training_tokens 99 --target_l0 7 --d_sae 59 --skip --layers 0-2,4 --memory_gb 3 --seed 5"
    )
    arguments = [
        "train-transcoders",
        "--model_name",
        "m",
        "--output_path",
        str(tmp_path),
        *flags.split(),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = TranscoderSettings(
        model_name="m",
        training_tokens=99,
        target_l0=7.0,
        d_sae=59,
        skip=True,
        layers=(0, 1, 2, 4),
        memory_gb=3.0,
        seed=5,
    )
    assert given == [(tmp_path, expected)]
    result = CliRunner().invoke(app, [*arguments, "--layers", "one"])
    assert result.exit_code == 2 and "--layers is 'one'" in result.output
