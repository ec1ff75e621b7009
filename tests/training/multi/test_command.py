"""`jumprelu train-many` on a model folder and a folder of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from tests.tiny import D_MODEL, HEADS, RESIDUAL, WIDTH
from tests.training.folders import flags

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")


def test_the_command_trains_them(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = flags(folders, tmp_path, hook_name=f"{RESIDUAL},{HEADS}", target_l0="5,7", d_sae=37)
    place = given.index("--d_in")
    del given[place : place + 2]
    result = CliRunner().invoke(app, ["train-many", *given, "--check_only"])
    assert result.exit_code == 0, result.output
    assert "peak memory: " in result.output and not (tmp_path / "output").exists()
    result = CliRunner().invoke(app, ["train-many", *given])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "output" / "dictionaries.json").read_text())
    names = [each["folder"] for each in record["dictionaries"]]
    assert names == [f"{h}-target_l0_{l0}" for h in (RESIDUAL, HEADS) for l0 in (5, 7)]
    widths = [SAE.load_from_disk(tmp_path / "output" / name).cfg.d_in for name in names]
    assert widths == [D_MODEL, D_MODEL, WIDTH[HEADS], WIDTH[HEADS]]
    result = CliRunner().invoke(app, ["train-many", *given])
    assert result.exit_code == 2 and "already holds dictionaries.json" in result.output
    result = CliRunner(env={"WORLD_SIZE": "2"}).invoke(app, ["train-many", *given])
    assert result.exit_code == 2 and "trains in one process" in result.output
