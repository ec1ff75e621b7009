"""Layers dealt over gloo processes against the training of one process."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from jumprelu_plugin.training.checkpoints import damage, numbered
from jumprelu_plugin.training.distributed.division import handed_over
from jumprelu_plugin.transcoders.per_layer.dealing import DealtRunner, DealtTrainer
from jumprelu_plugin.transcoders.per_layer.many_processes import train_dealt_transcoders
from jumprelu_plugin.transcoders.per_layer.run import train_transcoders
from tests.tiny import N_LAYERS, WIDTH, tiny_hf, tiny_hooked, tiny_tokenizer
from tests.training.distributed.processes import ended, run_on
from tests.training.transcoder_runs import POSITIONS, text
from tests.transcoders.on_many import (
    assert_same_files,
    how_it_ended,
    metrics_of,
    stopped_by_the_last,
)
from tests.transcoders.per_layer.test_run import settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 100, 41


def long(**changes: Any) -> Any:
    """Everything on: control, density limits, resampling."""
    return settings(training_tokens=STEPS * BATCH, max_latent_density=0.3, **changes)


def on_many(model: Any, folder: Path, chosen: Any, stop_at: int | None = None) -> str:
    """How one process of a run ended, in a word."""
    run = partial(train_dealt_transcoders, folder, chosen, model=model, dataset=text())
    with stopped_by_the_last(DealtTrainer, "_update_pbar", "n_training_steps", stop_at):
        return how_it_ended(run)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In float64, so that activations in float32 are the same however sequences are divided."""
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tiny_hooked(tiny_hf(), tokenizer).to(torch.float64)


@pytest.fixture(scope="module")
def one(model: Any, tmp_path_factory: pytest.TempPathFactory, one_thread_throughout: None) -> Path:
    folder = tmp_path_factory.mktemp("one") / "output"
    train_transcoders(folder, long(), model=model, dataset=text())
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """Weights and metrics to 1e-6 of their largest number; the same files."""
    assert_same_files(found, expected)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and len(ours) == N_LAYERS * 5
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6 * float(value.abs().max()))
    lines, others = metrics_of(found), metrics_of(expected)
    assert [list(line) for line in lines] == [list(line) for line in others]
    for line, other in zip(lines, others, strict=True):
        for layer in set(other) - {"step"}:
            for metric in ("losses/overall_loss", "metrics/l0"):
                assert line[layer][metric] == pytest.approx(other[layer][metric], rel=1e-6)
    mine, its = (json.loads((f / "transcoders.json").read_text()) for f in (found, expected))
    assert mine["settings"] == its["settings"]
    for layer, other in zip(mine["layers"], its["layers"], strict=True):
        assert list(layer) == list(other)
        for field, value in other.items():
            near = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert layer[field] == near, field


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_is_the_run_of_one_process(model: Any, one: Path, size: int, tmp_path: Path) -> None:
    found = run_on(size, on_many, tmp_path / "results", model, tmp_path / "output", long())
    assert found == ["finished"] * size
    assert_same(tmp_path / "output", one)
    assert SAE.load_from_disk(tmp_path / "output" / "layer_1").cfg.metadata.hook_name_out


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_on_another_number_of_processes(
    model: Any, one: Path, first: int, then: int, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    found = run_on(first, on_many, tmp_path / "first", model, output, long(), 58)
    assert all(how.startswith("InterruptedException interrupted; the same") for how in found)
    kept = numbered(output / "checkpoints")
    assert int(kept[-1].name) == 58 * BATCH and all(damage(path) is None for path in kept)
    assert not list(output.glob("checkpoints/.*")) and not list(output.glob("layer_*"))
    names = sorted(path.name for path in kept[-1].iterdir() if path.is_dir())
    assert names == [f"layer_{layer}" for layer in range(N_LAYERS)]
    if then == 1:
        train_transcoders(output, long(), model=model, dataset=text())
    else:
        run_on(then, on_many, tmp_path / "then", model, output, long())
    assert_same(output, one)


def dies(rank: int, model: Any, folder: Path) -> None:
    update = DealtTrainer._update_pbar

    def killed(self: DealtTrainer, *args: Any, **kwargs: Any) -> None:
        if rank == 1 and self.n_training_steps == 71:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, *args, **kwargs)

    DealtTrainer._update_pbar = killed  # type: ignore[method-assign]
    how = on_many(model, folder, long())
    assert how == "SystemExit 1", how


def test_a_killed_process_ends_the_run_with_one_message(
    model: Any, one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    codes, said = ended(2, dies, tmp_path / "results", model, output)
    assert codes == [0, -signal.SIGKILL], said
    assert said.count("a process of this run ended, and with it the run") == 1
    assert "the same command goes on from it" in said
    train_transcoders(output, long(), model=model, dataset=text())
    assert_same(output, one)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (2, {"layers": (1,)}, "2 processes were started, and there are 1 layers"),
        (2, {"memory_gb": 3.0}, "memory_gb is 3, which is not taken on many processes"),
        (2, {"layers": (0, 7)}, "there is no layer 7"),
    ],
)
def test_bad_input_is_one_message_of_the_first_process(
    model: Any, size: int, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    first, *others = run_on(size, on_many, tmp_path / "results", model, output, settings(**changes))
    assert first.startswith("ValueError ") and message in first
    assert all(how.startswith("SystemExit") for how in others)
    assert not output.exists()


def traffic(model: Any, folder: Path, chosen: Any) -> int:
    sent: list[int] = []
    run = DealtRunner.run

    def counted(self: DealtRunner) -> Any:
        found = run(self)
        sent.append(self.harvest.sent)
        return found

    DealtRunner.run = counted  # type: ignore[method-assign]
    assert on_many(model, folder, chosen) == "finished"
    return sent[0]


def test_a_process_hands_over_what_others_need_of_its_share(model: Any, tmp_path: Path) -> None:
    """Of every pass over 5 sequences, 3 a process; [layers 0, 2] to the first, 1 to the second."""
    chosen = settings(n_batches_for_norm_estimate=1, training_tokens=2 * BATCH, n_checkpoints=0)
    first, second = run_on(2, traffic, tmp_path / "results", model, tmp_path / "output", chosen)
    width = 2 * WIDTH["blocks.1.hook_resid_post"]
    assert first > 0 and second == 2 * first
    a_pass = 5 * POSITIONS
    assert first % handed_over(a_pass, 5, 2, width, 4) == 0
    assert handed_over(a_pass, 5, 2, width, 4) == 4 * width * 3 * POSITIONS
