"""A sweep: one record for each SAE, whatever stops it, and nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from sae_lens import SAE
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models.hooks import flat_heads
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.sequences import read_sequences
from jumprelu_plugin.studies.sweep import cells as cells_module
from jumprelu_plugin.studies.sweep import run as run_module
from jumprelu_plugin.studies.sweep.architectures import ARCHITECTURES
from jumprelu_plugin.studies.sweep.grid import SweepSettings, read_grid
from jumprelu_plugin.studies.sweep.record_file import read_records
from jumprelu_plugin.studies.sweep.run import RECORDS_FILENAME, run_sweep

pytestmark = pytest.mark.usefixtures("one_thread_throughout", "one_kernel")
HOOKS = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z")
# What a second run of the same cell may change.
TIMES = ("seconds", "cpu_seconds", "peak_memory_bytes", "provenance")


def grid(model_and_text: tuple[str, str], **changes: Any) -> SweepSettings:
    model, text = model_and_text
    given: dict[str, Any] = {
        "architectures": ("jumprelu-plugin", "topk"),
        "l0": (5,),
        "hook_names": HOOKS,
        "d_sae": 37,
        "training_tokens": 31 * 20,
        "train_batch_size_tokens": 31,
        "context_size": 13,
        "held_out": 17,
        "model_name": model,
        "dataset_path": text,
    }
    return SweepSettings(**{**given, **changes})


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"))  # noqa: SIM115


def table(folder: Path) -> list[dict[str, Any]]:
    """The records in their order, without times."""
    records, _ = read_records(folder / RECORDS_FILENAME)
    for record in records:
        for name in TIMES:
            record.pop(name)
    return sorted(records, key=lambda record: record["folder"])


@pytest.fixture(scope="module")
def swept(
    model_and_text: tuple[str, str], tmp_path_factory: pytest.TempPathFactory, one_kernel: None
) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    with torch.random.fork_rng():
        run_sweep(folder, grid(model_and_text), console=quiet())
    return folder


def test_every_cell_has_a_record_and_a_stock_sae(swept: Path) -> None:
    records, broken = read_records(swept / RECORDS_FILENAME)
    assert broken is None
    assert {(r["site"], r["architecture"]) for r in records} == {
        (hook, name) for hook in HOOKS for name in ("jumprelu-plugin", "topk")
    }
    for record in records:
        sae = SAE.load_from_disk(swept / record["folder"])
        assert sae.cfg.metadata.hook_name == record["site"] and sae.cfg.d_sae == 37
        assert json.loads((swept / record["folder"] / "record.json").read_text()) == record
        assert sum(record["density_histogram"]) == 37 - round(37 * record["dead_share"])
        assert 0 < record["uniformity"] <= 1 and record["seconds"] > 0
        assert record["provenance"]["versions"]["torch"] and record["provenance"]["model_digest"]


def test_the_numbers_are_those_of_the_saved_sae_on_held_out_text(
    swept: Path, model_and_text: tuple[str, str]
) -> None:
    model = load_model(model_and_text[0])
    _, tokens = read_sequences(model, model_and_text[1], context_size=13, held_out=17, train=1)
    for record in table(swept):
        sae = SAE.load_from_disk(swept / record["folder"])
        sae.turn_off_forward_pass_hook_z_reshaping()
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, prepend_bos=False)
            x = flat_heads(cache[record["site"]])[tokens > 2].double()
            acts = sae.encode(x.float())
            error = (sae.decode(acts).double() - x).square().sum()
        assert record["fvu"] == pytest.approx(
            float(error / (x - x.mean(0)).square().sum()), rel=1e-4
        )
        assert record["l0"] == pytest.approx(float((acts > 0).float().sum(1).mean()))


def test_finished_cells_are_not_trained_again_and_new_ones_are_added(
    swept: Path, model_and_text: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (swept / RECORDS_FILENAME).read_text()
    monkeypatch.setattr(cells_module, "train", lambda *_, **__: pytest.fail("trained again"))
    run_sweep(swept, grid(model_and_text), console=quiet())
    assert (swept / RECORDS_FILENAME).read_text() == before
    monkeypatch.undo()
    other = grid(model_and_text, hook_names=(*HOOKS, "blocks.0.hook_mlp_out"))
    with pytest.raises(ValueError, match="other activations than asked for .hooks"):
        run_sweep(swept, other, console=quiet())
    one_hook = grid(model_and_text, architectures=("topk",), l0=(5, 7), hook_names=HOOKS[:1])
    run_sweep(swept, one_hook, console=quiet())
    records, _ = read_records(swept / RECORDS_FILENAME)
    assert sorted(r["target_l0"] for r in records) == [5, 5, 5, 5, 7]
    more = grid(model_and_text, architectures=("topk",), l0=(5, 7))
    run_sweep(swept, more, console=quiet())
    records, _ = read_records(swept / RECORDS_FILENAME)
    assert sorted(r["target_l0"] for r in records) == [5, 5, 5, 5, 7, 7]
    (swept / RECORDS_FILENAME).write_text(before)


@pytest.mark.parametrize("moment", ["before the line", "in the line", "in a training"])
def test_a_stopped_sweep_ends_with_the_same_table(
    moment: str,
    swept: Path,
    model_and_text: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    class Killed(BaseException):
        pass

    def dying(real: Any, half_a_line: bool) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                if half_a_line:
                    with arguments[0].open("a") as file:
                        file.write(json.dumps(arguments[1])[:400])
                raise Killed
            return real(*arguments, **named)

        return call

    name = "train" if moment == "in a training" else "append_record"
    module = cells_module if name == "train" else run_module
    real = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(real, moment == "in the line"))
        with pytest.raises(Killed):
            run_sweep(tmp_path / "s", grid(model_and_text), console=quiet())
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    run_sweep(tmp_path / "s", grid(model_and_text), console=console)
    said = console.export_text()
    assert ("was broken and is now in records.jsonl.broken" in said) == (moment == "in the line")
    assert ("its record was missing and is added" in said) == (moment != "in a training")
    assert table(tmp_path / "s") == table(swept)
    assert not list((tmp_path / "s").glob("saes/*/*/.*"))


@pytest.mark.slow  # three processes that import everything
def test_a_sweep_killed_by_sigkill_ends_with_the_same_table(
    swept: Path, model_and_text: tuple[str, str], tmp_path: Path
) -> None:
    settings = {
        name: value
        for name, value in vars(grid(model_and_text, architectures=("topk",))).items()
        if value is not None
    }
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-m", "jumprelu_plugin.cli", "sweep", str(tmp_path / "grid.yaml")]
    command += ["--output_path", str(tmp_path / "s")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for wait in (0.3, 0.0):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        seen = len((tmp_path / "s" / RECORDS_FILENAME).read_text().splitlines()) if wait == 0 else 0
        while process.poll() is None:
            path = tmp_path / "s" / RECORDS_FILENAME
            if path.exists() and len(path.read_text().splitlines()) > seen:
                time.sleep(wait)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert table(tmp_path / "s") == [r for r in table(swept) if r["architecture"] == "topk"]


def test_ctrl_c_says_how_to_go_on(
    model_and_text: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cells_module, "train", interrupted)
    path = tmp_path / "grid.yaml"
    path.write_text("sites: []\nlr: {default: 1e-3, topk: 0.002}\n")
    model, text = model_and_text
    flags = f"--hook_names {HOOKS[0]} --model_name {model} --dataset_path {text} --d_sae 37"
    flags += " --l0 5 --training_tokens 620 --train_batch_size_tokens 31 --context_size 13"
    done = CliRunner().invoke(
        app, ["sweep", str(path), "--output_path", str(tmp_path / "s"), *flags.split()]
    )
    assert done.exit_code == 130 and "the same command goes on" in done.output
    assert not (tmp_path / "s" / RECORDS_FILENAME).exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("architectures: [jumprelu-plugin, batch_topk]", "unknown architecture 'batch_topk'.*mean"),
        ("sites: [residual, mpl]", "unknown site 'mpl'.*did you mean mlp"),
        ("l0s: [3]", "unknown field 'l0s'.*did you mean l0"),
        ("l0: []", "no l0: give at least one"),
        ("l0: [20, 4000]", "l0 has 4000; expected more than 0 and less than d_sae"),
        ("l0: [ten]", "wrong type"),
        ("sites: []", "no hooks: give sites and layers"),
        ("held_out: 0", "held_out is 0"),
        ("lr: {batchtopkk: 1e-3}", "unknown architecture in lr 'batchtopkk'"),
        ("cache_dtype: int4", "unknown cache_dtype 'int4'"),
        ("- a\n- b", "holds no grid"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_grid_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(path, {})


def test_flags_count_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "l0: [3, 5]\nlayers: 2\nsites: [mlp, residual]\nlr: {default: 1e-3, topk: 2e-3}"
    )
    settings = read_grid(path, {"l0": (7.0,), "architectures": ("topk", "gated")})
    assert read_grid(None, {"layers": (1,)}).hooks == ("blocks.1.hook_resid_post",)
    assert read_grid(None, {"hook_names": HOOKS}).hooks == HOOKS
    assert settings.hooks == ("blocks.2.hook_mlp_out", "blocks.2.hook_resid_post")
    assert [(c.target_l0, c.lr) for c in settings.cells()[:2]] == [(7, 2e-3), (7, 1e-3)]
    assert len(settings.cells()) == 4


def test_a_hook_that_the_model_has_not(model_and_text: tuple[str, str], tmp_path: Path) -> None:
    settings = grid(model_and_text, hook_names=("blocks.9.hook_resid_post",))
    with pytest.raises(ValueError, match="has no hook 'blocks.9.hook_resid_post'"):
        run_sweep(tmp_path / "s", settings, console=quiet())
    assert not (tmp_path / "s").exists()


def test_other_settings_in_the_same_folder(swept: Path, model_and_text: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="d_sae is 37 there and 41 here"):
        run_sweep(swept, grid(model_and_text, d_sae=41), console=quiet())


def test_a_broken_line_before_the_last_one(swept: Path, tmp_path: Path) -> None:
    first, second, *_ = (swept / RECORDS_FILENAME).read_text().splitlines()
    path = tmp_path / "records.jsonl"
    path.write_text(f"{first}\n{second[:300]}\n{second}\n")
    with pytest.raises(ValueError, match="line 2 is no record"):
        read_records(path)


def test_the_commands_list_of_architectures_is_complete() -> None:
    from jumprelu_plugin.cli.studies import NAMES

    assert list(NAMES) == list(ARCHITECTURES)
