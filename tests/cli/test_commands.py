"""The commands of a saved SAE, on the embedded model: what they print and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens.training._interruption import InterruptedException
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.formats.saved import SavedDictionary
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.recipes import RECIPES
from jumprelu_plugin.studies import demo
from tests.tiny import RESIDUAL, tiny_sae

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "The people of the country"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAE at the embedded model's layer 1; latent 7 is a direction of its own."""
    folder = tmp_path_factory.mktemp("sae")
    sae = tiny_sae(RESIDUAL, d_in=256)
    sae.cfg.metadata.model_name = EMBEDDED_MODEL
    sae.save_model(folder)
    return folder


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout  # without the progress bars


def test_evaluate_prints_a_table_and_writes_a_record(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    output = said(
        "evaluate", folder, "--sequences", 3, "--context_size", 29, "--output_path", record
    )
    written = json.loads(record.read_text())
    found = written["result"]
    assert f"{found['l0']:.2f}" in output and "delta LM loss" in output
    assert found["n_sequences"] == 3 and found["hook"] == RESIDUAL
    assert {"model_digest", "data_digest", "versions"} <= set(written["provenance"])


def test_steer_shows_text_without_and_with(folder: Path) -> None:
    steered = [
        said("steer", folder, "--latent", 7, "--prompt", PROMPT, "--tokens", 9, *more)
        for more in (("--amount", 40), ("--amount", 40), ("--amount", 0), ("--change", "ablate"))
    ]
    assert steered[0] == steered[1]  # the same seed
    halves = [text.split("with (") for text in steered]
    before, after = (half.split("\n", 1)[1].strip() for half in halves[0])
    assert before.startswith(PROMPT) and after.startswith(PROMPT) and before != after
    before, after = (half.split("\n", 1)[1].strip() for half in halves[2])
    assert before == after  # by nothing
    assert "ablate latent 7" in steered[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--output_path", "taken"], "taken is a folder: give a file to write, such as "
         "taken/evaluation.json"),
        (["dashboard", "--output_path", "taken"], "taken is a folder: give a file to write, such "
         "as taken/features.html"),
        (["dashboard", "--output_path", "file/p.html"], "is a file: give"),
        (["steer", "--latent", "999", "--prompt", PROMPT], "its latents are 0 to 40"),
        (["steer", "--latent", "-1"], "its latents are 0 to 40"),
    ],
)  # fmt: skip
def test_what_cannot_end_does_not_begin(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the computation began")

    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("file").touch()
    if arguments[0] == "steer":  # the model tells no more than the dictionary which latents exist
        monkeypatch.setattr(SavedDictionary, "sequences", begun)
        monkeypatch.setattr("jumprelu_plugin.analysis.generation.generate", begun)
    else:
        monkeypatch.setattr("jumprelu_plugin.formats.saved.load_saved", begun)
    command, *flags = arguments
    result = CliRunner().invoke(app, [command, str(folder), *flags])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_recipes_are_listed_with_their_sources() -> None:
    output = said("recipes")
    for recipe in RECIPES.values():
        assert recipe.name in output and recipe.source.split()[0] in output


def test_an_interrupted_command_says_so_and_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise InterruptedException("interrupted; nothing was saved")

    monkeypatch.setattr(demo, "_run", interrupted)
    result = CliRunner().invoke(app, ["demo", "--output_path", str(tmp_path / "demo")])
    assert result.exit_code == 130
    assert result.output.strip() == "interrupted; nothing was saved"
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()
