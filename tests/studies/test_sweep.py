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
from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.hooks import flat_heads
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.sequences import read_sequences
from jumprelu_plugin.studies.sweep import cells as cells_module
from jumprelu_plugin.studies.sweep import run as run_module
from jumprelu_plugin.studies.sweep.architectures import ARCHITECTURES
from jumprelu_plugin.studies.sweep.grid import SweepSettings, read_grid
from jumprelu_plugin.studies.sweep.record_file import read_records
from jumprelu_plugin.studies.sweep.run import RECORDS_FILENAME, run_sweep
from jumprelu_plugin.training.activations.cache.writer import write_activation_cache

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
        ("l0: [ten]", "l0 is 'ten'; give numbers"),
        ("l0: [true]", r"l0 is \[True\]; expected numbers"),
        ("seeds: [0.5]", r"seeds is \[0.5\]; expected whole numbers such as 0,1,3 or 0-5"),
        ("seeds: 0-a", "seeds is '0-a'; give numbers such as 0,1,3 or 0-5"),
        ("seeds: -1", "seeds has -1; expected 0 or more"),
        ("layers: {2: 3}", "layers is {2: 3}; expected whole numbers"),
        ("layers:", "layers is None; expected whole numbers"),
        ("d_sae: 64.5", "d_sae is 64.5; expected a whole number"),
        ("d_sae: many", "d_sae is 'many'; expected a whole number"),
        ("d_sae:", "d_sae is None; expected a whole number"),
        ("context_size: true", "context_size is True; expected a whole number"),
        ("training_tokens: .inf", "training_tokens is inf; expected a whole number"),
        ("train_together: 2.5", "train_together is 2.5; expected a whole number"),
        ("cached_tokens: 0", "cached_tokens is 0; expected at least 1"),
        ("lr: fast", "lr is 'fast'; expected a number"),
        ("lr: {topk: fast}", "lr of topk is 'fast'; expected a number"),
        ("device: 3", "device is 3; expected text"),
        ("hook_names: [3]", r"hook_names is \[3\]; expected a list of names"),
        ("architectures: [[topk]]", r"architectures is \[\['topk'\]\]; expected a list of names"),
        ("model_from_pretrained_kwargs: [1]", r"kwargs is \[1\]; expected names and values"),
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


def test_numbers_and_lists_as_people_write_them(tmp_path: Path) -> None:
    """In YAML 2.0e+3 is a float, and 1e3 and 0-1 are text."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        "d_sae: 67.0\ntraining_tokens: 2.0e+3\nheld_out: 1e1\nseeds: 0-1\nlayers: [0-2, 5.0]\n"
        "l0: 5,7.5\nlr: 1e-3\narchitectures: topk, gated\nhook_names: a\n"
    )
    settings = read_grid(path, {})
    counts = (settings.d_sae, settings.training_tokens, settings.held_out)
    assert counts == (67, 2000, 10) and {type(count) for count in counts} == {int}
    assert settings.seeds == (0, 1) and settings.layers == (0, 1, 2, 5)
    assert {type(number) for number in (*settings.seeds, *settings.layers)} == {int}
    assert settings.l0 == (5, 7.5) and settings.lr == 1e-3
    assert settings.architectures == ("topk", "gated") and settings.hook_names == ("a",)


# ---------------------------------------------------------------- another activation cache


@pytest.fixture(scope="module")
def cache_of_7_tokens(
    model_and_text: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A cache in bfloat16, of sequences of 7 tokens without BOS."""
    model, text = model_and_text
    folder = tmp_path_factory.mktemp("cache") / "activations"
    loaded = load_model(model)
    tokens, _ = read_sequences(
        loaded, text, context_size=7, held_out=0, train=61, prepend_bos=False
    )
    write_activation_cache(
        folder, loaded, HOOKS[:1], tokens, model_name=model, dataset_path=text, prepend_bos=False,
        dtype="bfloat16", log=lambda _: None,
    )  # fmt: skip
    return str(folder)


def test_what_is_not_given_is_as_in_the_cache_that_is_read(
    cache_of_7_tokens: str, model_and_text: tuple[str, str], tmp_path: Path
) -> None:
    """The model, the text, its sequences, and what the records are measured on."""
    model_name, text = model_and_text
    (tmp_path / "grid.yaml").write_text(
        f"architectures: topk\nl0: 5\nhook_names: {HOOKS[0]}\nd_sae: 37\n"
        f"training_tokens: 310\ntrain_batch_size_tokens: 31\nheld_out: 17\n"
    )
    done = CliRunner().invoke(
        app,
        ["sweep", str(tmp_path / "grid.yaml"), "--output_path", str(tmp_path / "s"),
         "--activations", cache_of_7_tokens],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    ((record,), _) = read_records(tmp_path / "s" / RECORDS_FILENAME)
    sae = SAE.load_from_disk(tmp_path / "s" / record["folder"])
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.dataset_path) == model_and_text
    assert (metadata.context_size, metadata.prepend_bos) == (7, False)
    assert record["model"] == model_name and record["cache_dtype"] == "bfloat16"
    fixed = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert (fixed["context_size"], fixed["dataset_path"]) == (7, text)
    tokens, _ = read_sequences(
        load_model(model_name), text, context_size=7, held_out=0, train=61 + 17, prepend_bos=False
    )
    assert record["provenance"]["data_digest"] == digest(tokens[61:])  # the cache holds the others


def test_what_is_given_and_not_in_the_cache_is_refused(
    cache_of_7_tokens: str, model_and_text: tuple[str, str]
) -> None:
    with pytest.raises(ValueError, match="is not of this sweep") as refused:
        grid(("tiny-gemma-2", ""), activations=cache_of_7_tokens, cache_dtype="int8")
    model, text = model_and_text
    for difference in (
        f"model_name is {model!r} in the cache and 'tiny-gemma-2' in the sweep",
        f"dataset_path is {text!r} in the cache and '' in the sweep",
        "context_size is 7 in the cache and 13 in the sweep",
        "cache_dtype is 'bfloat16' in the cache and 'int8' in the sweep",
    ):
        assert difference in str(refused.value)
    assert grid(model_and_text, activations=cache_of_7_tokens, context_size=7).context_size == 7
    with pytest.raises(ValueError, match="is not an activation cache"):
        grid(model_and_text, activations=text)
    with pytest.raises(ValueError, match="cached_tokens is 600, .* written already"):
        grid(model_and_text, activations=cache_of_7_tokens, context_size=7, cached_tokens=600)


# ---------------------------------------------------------------- refusals, with a model


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
