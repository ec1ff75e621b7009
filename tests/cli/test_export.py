"""`jumprelu export`: what it writes and what it refuses."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from jumprelu_plugin import formats as exports
from jumprelu_plugin.cli.app import app
from tests.dictionaries import random_sae, saved


def test_command(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    run = CliRunner().invoke
    done = run(
        app, ["export", str(folder), "--to", "gemma-scope", "--output_path", f"{tmp_path}/out"]
    )
    assert done.exit_code == 0 and "largest relative error" in done.output.replace("\n", " ")
    listed = run(app, ["export", "--list"])
    assert all(name in listed.output for name in exports.TARGETS)
    common = ["export", str(folder), "--output_path", "x"]
    assert "--fold_gain: not an option of --to gemma-scope" in refusal(
        [*common, "--to", "gemma-scope", "--fold_gain"]
    )
    assert "expected one of" in refusal([*common, "--to", "x"])
    assert "--list" in refusal(["export"])
    assert "1 latents and 0 amounts" in refusal([*common, "--to", "lm-eval", "--latents", "3"])
    twice = ["--to", "lm-eval", "--latents", "7,11,7", "--amounts", "20,3,-5"]
    assert "--latents names 7 more than once" in refusal([*common, *twice])


def refusal(command: list[str]) -> str:
    """What a command that is refused prints, out of its frame."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())
