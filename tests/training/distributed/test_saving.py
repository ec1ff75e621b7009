"""What the first of several processes takes while it saves the whole dictionary."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.training.distributed.launch import joined
from jumprelu_plugin.training.distributed.planning import plan
from jumprelu_plugin.training.distributed.runner import ShardedTrainingRunner
from jumprelu_plugin.training.distributed.trainer import ShardTrainer
from jumprelu_plugin.training.health.machine import taken
from jumprelu_plugin.training.health.saving import HOST
from tests.training.distributed.processes import run_on
from tests.training.distributed.test_runs import BATCH, small
from tests.training.runs import token_rows

# `mallopt`'s name for the size from which memory goes back to the system when it is freed.
M_MMAP_THRESHOLD = -3
D_SAE, SHARDS, STEPS = 2**18, 2, 4


def large(folder: Path) -> Any:
    cfg = small(folder, d_sae=D_SAE, n_checkpoints=2, training_tokens=STEPS * BATCH)
    plain = {"max_latent_density": None, "matryoshka_loss_weight": 0.0, "matryoshka_widths": None}
    cfg.sae = dataclasses.replace(cfg.sae, **plain)
    cfg.lr_decay_steps = 0
    return cfg


def peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (found,) = (1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return found


def memory_of_a_run(model: Any, folder: Path) -> tuple[int, list[int]]:
    """Bytes of a process beside what it has before training: at its peak, and after each save."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 131072)
    with joined(1, SHARDS, "cpu") as launch:
        runner = ShardedTrainingRunner(
            launch,
            large(folder),
            override_model=model,
            override_dataset=token_rows(),
            check_first=False,
        )
        runner.metrics_path = None
        left: list[int] = []
        save = ShardTrainer.save_checkpoint

        def saving(self: Any, *arguments: Any, **named: Any) -> None:
            save(self, *arguments, **named)
            left.append(taken(HOST) - before)

        ShardTrainer.save_checkpoint = saving  # type: ignore[method-assign]
        before = taken(HOST)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        runner.run()
        return peak() - before, left


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
def test_the_first_takes_what_is_forecast_when_it_saves(
    model: Any, tmp_path: Path, one_thread: None, wide_terminal: None
) -> None:
    found = plan(
        large(tmp_path),
        data_parallel_size=1,
        model_parallel_size=SHARDS,
        override_model=model,
        override_dataset=token_rows(),
    ).preflight
    saving, each = found.saving, found.memory
    assert saving is not None and each is not None
    first, second = run_on(SHARDS, memory_of_a_run, tmp_path / "results", model, tmp_path)
    (measured, left), (most, _) = first, second
    assert measured > 200e6  # there is something to predict
    assert measured / 1.3 < saving.peak - saving.there < 1.3 * measured
    # The other process joins nothing.
    assert most / 1.3 < each.peak - each.there < 1.3 * most < measured
    # What was joined for one checkpoint is gone before the next.
    assert len(left) == 2 and abs(left[1] - left[0]) < 20e6
