"""A process that is killed ends the run: one message, and the last checkpoint goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.training.checkpoints import damage
from jumprelu_plugin.training.distributed.sharded_sae import ShardOfSAE
from tests.training.distributed.processes import ended
from tests.training.distributed.test_runs import (
    STEPS,
    assert_same_output,
    last_checkpoint,
    on_many,
    small,
)
from tests.training.runs import run, token_rows


def dies_in_a_step(
    rank: int, model: Any, folder: Path, sizes: tuple[int, int], victim: int, step: int
) -> None:
    """A run in which one process is killed while the others wait for what it computes."""
    forward = ShardOfSAE.training_forward_pass

    def killed(self: ShardOfSAE, step_input: Any) -> Any:
        if rank == victim and step_input.n_training_steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, step_input)

    ShardOfSAE.training_forward_pass = killed
    how = on_many(model, folder, sizes, {})
    assert how == "SystemExit 1", how


@pytest.mark.parametrize(("sizes", "victim"), [((1, 2), 1), ((2, 1), 0)], ids=["last", "first"])
def test_a_killed_process_ends_the_run_with_one_message(
    model: Any, sizes: tuple[int, int], victim: int, tmp_path: Path
) -> None:
    codes, said = ended(
        2, dies_in_a_step, tmp_path / "results", model, tmp_path, sizes, victim, STEPS - 7
    )
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0, said
    message = "a process of this run ended, and with it the run"
    assert said.count(message) == 1 and "--resume_from_checkpoint auto" in said
    assert not (tmp_path / "output" / "cfg.json").exists()
    checkpoint = last_checkpoint(tmp_path)
    assert damage(checkpoint) is None
    run(model, small(tmp_path, resume_from_checkpoint="auto"), token_rows(), check_first=False)
    run(model, small(tmp_path / "one"), token_rows(), check_first=False)
    assert_same_output(tmp_path, tmp_path / "one")
