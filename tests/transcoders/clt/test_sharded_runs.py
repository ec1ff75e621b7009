"""`train-clt` on many processes: its folder is one process's, and any number of them resumes it."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jumprelu_plugin.training import checkpoints
from jumprelu_plugin.training.checkpoints import damage, numbered
from jumprelu_plugin.training.distributed.agreed import CheckpointsByTheFirst
from jumprelu_plugin.training.distributed.launch import joined
from jumprelu_plugin.transcoders.clt import load_clt
from jumprelu_plugin.transcoders.clt.many_processes import train_sharded_clt
from jumprelu_plugin.transcoders.clt.run import train_clt
from jumprelu_plugin.transcoders.clt.sharded_step import ShardedTrainingStep
from jumprelu_plugin.transcoders.clt.sharded_trainer import ShardedTrainer
from tests.tiny import N_LAYERS
from tests.training.distributed.processes import ended, run_on
from tests.transcoders.clt.test_run import settings, text, weights
from tests.transcoders.on_many import (
    assert_same_files,
    how_it_ended,
    metrics_of,
    stopped_by_the_last,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 30, 42
Sizes = tuple[int, int]


def everything(**changes: Any) -> Any:
    """Control, density limits, outlier limits and resampling."""
    given = {
        "d_sae": 60,
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "max_latent_density": 0.3,
        "outlier_norm_ratio": 1.5,
        "store_batch_size_prompts": 6,
        **changes,
    }
    return settings(**given)


def on_many(model: Any, folder: Path, sizes: Sizes, chosen: Any, stop_at: int = -1) -> str:
    """How one process of a run ended, in a word."""
    run = partial(
        train_sharded_clt,
        folder,
        chosen,
        data_parallel_size=sizes[0],
        model_parallel_size=sizes[1],
        model=model,
        dataset=text(),
    )
    with stopped_by_the_last(ShardedTrainer, "_show", "step", stop_at):
        return how_it_ended(run)


@pytest.fixture(scope="module")
def one(model: Any, tmp_path_factory: pytest.TempPathFactory, one_thread_throughout: None) -> Path:
    folder = tmp_path_factory.mktemp("one") / "output"
    train_clt(folder, everything(), model=model, dataset=text())
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """Weights and metrics to float32's rounding; the same files."""
    assert_same_files(found, expected)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and len(ours) == N_LAYERS * 5
    for name, value in theirs.items():
        # A bias is added to pre-activations, and as exact as these.
        scale = float(theirs[name.replace("b_enc", "threshold")].abs().max())
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6 * scale, msg=name)
    lines, others = metrics_of(found), metrics_of(expected)
    assert len(lines) == len(others) == STEPS // 10
    for line, other in zip(lines, others, strict=True):
        assert list(line) == list(other) and line["l0"] == other["l0"]
        for metric in ("step", "loss", "fvu", "coefficient", "dead", "lr"):
            assert line[metric] == pytest.approx(other[metric], rel=2e-6, abs=1e-9), metric
    mine, its = (json.loads((f / "cross_layer_record.json").read_text()) for f in (found, expected))
    for field in ("kind", "settings", "config", "l0_in_training"):
        assert mine[field] == its[field], field
    assert mine["coefficients"] == pytest.approx(its["coefficients"], rel=2e-6)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["latents", "tokens"])
def test_it_is_the_run_of_one_process(model: Any, one: Path, sizes: Sizes, tmp_path: Path) -> None:
    output = tmp_path / "output"
    found = run_on(2, on_many, tmp_path / "results", model, output, sizes, everything())
    assert found == ["finished"] * 2
    assert_same(output, one)
    assert load_clt(output).cfg.d_sae == 60


@pytest.mark.slow
def test_four_processes_run_as_one(model: Any, one: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    found = run_on(4, on_many, tmp_path / "results", model, output, (2, 2), everything())
    assert found == ["finished"] * 4
    assert_same(output, one)


@pytest.mark.parametrize(
    "then", [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["one", "four"]
)
def test_a_run_stopped_on_two_goes_on_on_another_number(
    model: Any, one: Path, then: Sizes, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    found = run_on(2, on_many, tmp_path / "first", model, output, (1, 2), everything(), 19)
    assert all(how.startswith("InterruptedException interrupted; the same") for how in found)
    kept = numbered(output / "checkpoints")
    assert [path.name for path in kept] == ["15", "19"]
    assert all(damage(path) is None for path in kept) and not list(output.glob("layer_*"))
    if then == (1, 1):
        train_clt(output, everything(), model=model, dataset=text())
    else:
        run_on(4, on_many, tmp_path / "then", model, output, then, everything())
    assert_same(output, one)


def test_a_run_stopped_on_one_goes_on_on_two(model: Any, one: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    found = run_on(1, on_many, tmp_path / "first", model, output, (1, 1), everything(), 17)
    assert found[0].startswith("InterruptedException")
    assert run_on(2, on_many, tmp_path / "then", model, output, (1, 2), everything()) == [
        "finished",
        "finished",
    ]
    assert_same(output, one)


def dies(rank: int, model: Any, folder: Path) -> None:
    """A run in which one process is killed while the others wait for what it computes."""
    loss = ShardedTrainingStep.loss

    def killed(self: ShardedTrainingStep, *args: Any) -> Any:
        if rank == 1 and self.steps == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, *args)

    ShardedTrainingStep.loss = killed  # type: ignore[method-assign]
    how = on_many(model, folder, (1, 2), everything())
    assert how == "SystemExit 1", how


def test_a_killed_process_ends_the_run_with_one_message(
    model: Any, one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    codes, said = ended(2, dies, tmp_path / "results", model, output)
    assert codes == [0, -signal.SIGKILL], said
    assert said.count("a process of this run ended, and with it the run") == 1
    assert "the same command goes on from it" in said
    assert damage(numbered(output / "checkpoints")[-1]) is None
    train_clt(output, everything(), model=model, dataset=text())
    assert_same(output, one)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((1, 2), {"d_sae": 61}, "d_sae is 61, which model_parallel_size=2 does not divide"),
        ((2, 1), {"train_batch_size_tokens": 43}, "43, which data_parallel_size=2 does not divide"),
        ((1, 2), {"memory_gb": 3.0}, "memory_gb is 3, which is not taken on many processes"),
        ((1, 2), {"layers": (0, 7)}, "there is no layer 7"),
        ((1, 2), {"target_l0": 70.0}, "target_l0 is 70.0; it must be at most d_sae, which is 60"),
        ((2, 2), {}, "is 4, and torchrun started 2 processes: give sizes whose product is 2"),
    ],
    ids=str,
)
def test_bad_input_is_one_message_of_the_first_process(
    model: Any, sizes: Sizes, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    output, chosen = tmp_path / "output", everything(**changes)
    first, second = run_on(2, on_many, tmp_path / "results", model, output, sizes, chosen)
    assert first.startswith("ValueError ") and message in first
    # What ends the others before they joined is said by nobody: their console is closed.
    assert second == "SystemExit 2" or message in second
    assert not output.exists()


def test_a_process_alone_is_told_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"start the run with torchrun .* train-clt … --data"):
        train_sharded_clt(tmp_path / "output", everything(), model_parallel_size=2)


def of_another_seed(folder: Path) -> str:
    chosen = everything(seed=int(os.environ["RANK"]))
    return on_many(None, folder, (1, 2), chosen)


def test_processes_with_different_settings_are_refused(tmp_path: Path) -> None:
    first, second = run_on(2, of_another_seed, tmp_path / "results", tmp_path / "output")
    assert "process 1 has another command than process 0" in first and second == "SystemExit 2"


def due_by_two_clocks(folder: Path) -> list[bool]:
    """Whether a checkpoint is due before and after one is saved, by clocks that are far apart."""
    now = [0.0]
    checkpoints.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[attr-defined]
    with joined(1, 2, "cpu") as launch:
        kept = CheckpointsByTheFirst(launch, folder, 1.0)
        now[0] = 61.0 + 1000 * launch.rank
        due = [kept.due()]
        saved = kept.save("7", lambda place: place.joinpath("x").touch())
        assert saved == folder / "7" == kept.last
        return [*due, kept.due()]


def test_a_checkpoint_is_due_once_by_the_first_s_clock(tmp_path: Path) -> None:
    found = run_on(2, due_by_two_clocks, tmp_path / "results", tmp_path / "checkpoints")
    assert found == [[True, False]] * 2
