"""torchrun starts a run again in which a process died, and the run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_DIES_ONCE = """
import os, runpy, signal, sys
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE

forward = JumpReLUTrainingSAE.training_forward_pass

def killed(self, step_input):
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_time and os.environ["RANK"] == "1" and step_input.n_training_steps == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, step_input=step_input)

JumpReLUTrainingSAE.training_forward_pass = killed
sys.argv[0] = "jumprelu"
runpy.run_module("jumprelu_plugin", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_restarted_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "dies_once.py").write_text(_DIES_ONCE)
    sizes = {
        "d_in": 256, "d_sae": 128, "target_l0": 8, "training_tokens": 20_480,
        "train_batch_size_tokens": 1_024, "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 2, "n_checkpoints": 3, "model_parallel_size": 2,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--max-restarts", "1", "dies_once.py", "train",
        "--model_name", "tiny-gemma-2", "--hook_name", "blocks.2.hook_resid_post",
        *(f"--{name}={value}" for name, value in sizes.items()),
        "--log_to_wandb=False", "--output_path=out", "--checkpoint_path=checkpoints",
        "--resume_from_checkpoint=auto",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert "starting fresh" in ended.stderr and "resuming from checkpoints" in ended.stderr
    assert (tmp_path / "out" / "cfg.json").is_file()
