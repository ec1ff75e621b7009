"""Sweeps over L0: folders, records, interruption, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.finetune.activations import harvest_activations
from jumprelu_plugin.finetune.l0_sweep import (
    SweepPoint,
    frontier_table,
    run_l0_sweep,
    sweep_warnings,
)
from jumprelu_plugin.finetune.refit import RefitSettings
from tests.dictionaries import random_transcoder
from tests.finetune.l0_targets import activations, l0_of
from tests.tiny import BOS, HEADS, RESIDUAL, tiny_models, tiny_sae, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_sweep_is_stock_folders_and_a_record(tmp_path: Path) -> None:
    source = tiny_sae()
    source.cfg.metadata.l0 = 41.5
    source.cfg.metadata.training_architecture_details = {"target_l0": 40.0, "other": 3}
    source.save_model(tmp_path / "sae")
    models = tiny_models(tmp_path / "tokenizer")
    tokens = tiny_tokens(301, 17, seed=3)
    rows = harvest_activations(models.hooked, RESIDUAL, tokens, special_token_ids=[BOS])
    held_out = harvest_activations(models.hooked, RESIDUAL, tiny_tokens(53, 17, seed=4))
    said: list[str] = []
    points = run_l0_sweep(
        tmp_path / "sae",
        [12, 5],
        tmp_path / "out",
        activations=rows,
        held_out=held_out,
        settings=RefitSettings(steps=5, batch_tokens=503),
        model=models.hooked,
        tokens=tiny_tokens(7, 17, seed=5),
        log=said.append,
    )
    assert [point.target_l0 for point in points] == [5, 12] and len(said) == 2
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["l0_12", "l0_5", "l0_sweep.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "l0_sweep.jsonl").open()]
    assert {line["target_l0"]: line["l0"] for line in lines} == {r.target_l0: r.l0 for r in points}
    assert all(line["kind"] == "l0_sweep" and line["settings"]["steps"] == 5 for line in lines)
    for point in points:
        sae = SAE.load_from_disk(tmp_path / "out" / point.folder)
        metadata = sae.cfg.metadata  # of the point, and not of the source
        assert metadata.l0 == pytest.approx(l0_of(sae, rows), rel=1e-6)
        assert metadata.training_architecture_details == {"target_l0": point.target_l0, "other": 3}
        assert metadata.refitted_from == str(tmp_path / "sae")
        assert sae.cfg.architecture() == "jumprelu" and sae.cfg.metadata.hook_name == RESIDUAL
        assert point.l0 == pytest.approx(l0_of(sae, held_out), rel=1e-6)
        error = (sae(held_out) - held_out).square().sum()
        variance = (held_out - held_out.mean(0)).square().sum()
        assert point.fvu == pytest.approx(float(error / variance), rel=1e-4)
        assert point.delta_loss is not None
    assert "delta LM loss" in [str(column.header) for column in frontier_table(points).columns]
    with pytest.raises(ValueError, match="not empty"):
        run_l0_sweep(tmp_path / "sae", [5], tmp_path / "out", activations=rows, held_out=held_out)


def test_an_interrupted_sweep_keeps_complete_points(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae")

    def stop(text: str) -> None:
        if "L0 5" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_l0_sweep(
            tmp_path / "sae",
            [5, 8],
            tmp_path / "out",
            activations=activations(3),
            held_out=activations(4),
            settings=RefitSettings(steps=0),
            log=stop,
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["l0_8", "l0_sweep.jsonl"]
    assert SAE.load_from_disk(tmp_path / "out" / "l0_8").cfg.d_sae == 41


def test_activations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae")
    broken = activations(3)
    broken[7, 2] = torch.nan
    for name, x, said in (
        ("activations", activations(3, d_in=29), r"activations has shape \(4099, 29\)"),
        ("held_out", broken, "held_out holds NaN"),
    ):
        given = {"activations": activations(3), "held_out": activations(4)} | {name: x}
        with pytest.raises(ValueError, match=said):
            run_l0_sweep(tmp_path / "sae", [5], tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_harvested_activations_are_the_cache_without_special_tokens(
    hook: str, tmp_path: Path
) -> None:
    models, tokens = tiny_models(tmp_path), tiny_tokens(11, 13)
    rows = harvest_activations(models.hooked, hook, tokens, special_token_ids=[BOS], batch_size=3)
    _, cache = models.hooked.run_with_cache(tokens)
    wanted = cache[hook].flatten(2)[:, 1:].flatten(0, 1)
    assert rows.shape == wanted.shape
    assert float((rows[:7] - wanted[:7]).abs().max()) > 0.1  # in another order
    torch.testing.assert_close(rows.sort(0).values, wanted.sort(0).values, rtol=1e-4, atol=1e-5)
    distances = torch.cdist(rows.double(), wanted.double())
    assert float(distances.min(1).values.max()) < 1e-4
    # A slice, and the form of SAELens' seqpos_slice.
    for positions in (slice(2, -3), (2, -3), (2, 10, None)):
        inner = harvest_activations(models.hooked, hook, tokens, positions=positions)
        wanted = cache[hook].flatten(2)[:, 2:-3].flatten(0, 1)
        torch.testing.assert_close(
            inner.sort(0).values, wanted.sort(0).values, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match="no hook"):
        harvest_activations(models.hooked, "blocks.9.hook_resid_post", tokens)


def test_warnings_name_the_points_that_are_off() -> None:
    good = SweepPoint("l0_10", 10, 10.1, 0.2, 0.3, 0.0, 0.0, None)
    off = dataclasses.replace(good, target_l0=20, l0=21, fvu=0.25)
    assert sweep_warnings([good]) == []
    first, second = sweep_warnings([good, off])
    assert "5.0% off" in first and "no lower error than L0 10" in second
    (worse,) = sweep_warnings([dataclasses.replace(good, shifted_fvu=0.19)])
    assert "train for more steps" in worse


def test_the_command_on_the_embedded_model(tmp_path: Path) -> None:
    sae = tiny_sae("blocks.1.hook_resid_post", d_in=256, d_sae=67)
    sae.cfg.metadata.model_name = "tiny-gemma-2"
    sae.save_model(tmp_path / "sae")
    few = [
        "--sequences",
        "9",
        "--held_out",
        "5",
        "--steps",
        "2",
        "--train_batch_size_tokens",
        "211",
    ]
    arguments = ["l0-sweep", str(tmp_path / "sae"), "--output_path", str(tmp_path / "out"), *few]
    result = CliRunner().invoke(app, [*arguments, "--l0", "5,9"])
    assert result.exit_code == 0, result.output
    assert "L0 sweep" in result.output
    assert SAE.load_from_disk(tmp_path / "out" / "l0_9").cfg.d_sae == 67
    result = CliRunner().invoke(app, [*arguments, "--l0", "many"])
    assert result.exit_code == 2 and "give numbers such as" in result.output


@pytest.mark.parametrize(
    ("l0", "output", "source", "message"),
    [
        ("0", "out", "sae", "a target L0 is 0; expected a number more than 0"),
        ("5,5", "out", "sae", "a target L0 is given twice: 5, 5"),
        ("5", "sae", "sae", "is not empty; give another folder"),
        ("5", "out", "transcoder", "only SAEs, which read and write the same hook"),
    ],
)
def test_the_command_refuses_before_it_loads_the_model(
    l0: str, output: str, source: str, message: str, tmp_path: Path
) -> None:
    """The model that the SAE names is nowhere, so that a later check would not come to speak."""
    tiny_sae().save_model(tmp_path / "sae")
    random_transcoder().save_model(tmp_path / "transcoder")
    result = CliRunner().invoke(
        app,
        ["l0-sweep", str(tmp_path / source), "--output_path", str(tmp_path / output), "--l0", l0,
         "--model_name", str(tmp_path / "nowhere")],
    )  # fmt: skip
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
