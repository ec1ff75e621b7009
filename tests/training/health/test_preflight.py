"""Runs that cannot work are refused; the others are shown and left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.tiny import D_MODEL, MLP
from tests.training.folders import files, flags
from tests.training.runs import BATCH, D_SAE, config, run, token_rows

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")
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
    folders: Path,
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
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(folders, tmp_path)
    of_train = ["--no_save_buffer", "--checkpoint_every_n_minutes", "5"]
    result = CliRunner().invoke(app, ["check", *of_train, *flags(folders, tmp_path)])
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


def test_a_refusal_can_be_overruled(folders: Path, tmp_path: Path) -> None:
    given = flags(folders, tmp_path, jumprelu_bandwidth=1e-9)
    result = CliRunner().invoke(app, ["train", "--no_check_first", *given])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "output" / "cfg.json").exists()


def test_a_checked_run_is_the_run(model: Any, tmp_path: Path) -> None:
    checked, plain = (
        run(model, config(tmp_path / str(check), training_tokens=70 * BATCH), token_rows(),
            check_first=check)
        for check in (True, False)
    )  # fmt: skip
    for name, value in checked.sae.state_dict().items():
        assert torch.equal(value, plain.sae.state_dict()[name]), name


def test_a_transcoder_is_checked_on_both_sides(model: Any, tmp_path: Path) -> None:
    sae = JumpReLUTrainingTranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=D_SAE, target_l0=7,
                                           hook_name_out=MLP)  # fmt: skip
    cfg = config(tmp_path, sae=sae, hook_name="blocks.1.ln2.hook_normalized")
    runner = JumpReLUTrainingRunner(cfg, override_dataset=token_rows(), override_model=model)
    random = torch.get_rng_state()
    report = runner.preflight()
    assert torch.equal(torch.get_rng_state(), random)
    assert report.first is not None and report.first.l0 == pytest.approx(7, rel=0.15)
    # In units of the outputs' own spread, a root mean square of 1 a coordinate.
    assert report.first.variance == pytest.approx(D_MODEL, rel=1e-4)
    assert not report.of("refused")
