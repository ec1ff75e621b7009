"""An interrupted run goes on where it stopped: real signals, equal weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training._interruption import InterruptedException

from jumprelu_plugin.cli.saelens_flags import Command, run_config
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.tiny import D_MODEL, RESIDUAL, VOCABULARY, tiny_hf, tiny_tokenizer
from tests.training.runs import (
    BATCH,
    CONTEXT,
    D_SAE,
    assert_same_sae,
    config,
    run,
    steps_logged,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
# ---------------------------------------------------------------- real signals


def interrupted(command: Sequence[str], folder: Path, sent: signal.Signals) -> tuple[int, str]:
    """Run `command` until it has logged a few steps, send the signal, return exit code, stderr."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    metrics = folder / "output" / "metrics.jsonl"
    with open(folder / "stderr", "w+") as said:
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=said, cwd=folder
        )
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= 7:
                child.send_signal(sent)
                break
            time.sleep(0.01)
        try:
            code = child.wait(60)
        finally:
            child.kill()
        said.seek(0)
        return code, said.read()


def only_checkpoint(folder: Path) -> Path:
    (checkpoint,) = (folder / "checkpoints").glob("*/*")
    assert not checkpoint.name.startswith(".")  # no unfinished one beside it either
    assert 7 <= int(checkpoint.name) // BATCH < 300
    return checkpoint


def test_ctrl_c_on_the_command_line_resumes_exactly(tmp_path: Path) -> None:
    """From a model folder and untokenised text, where one document spans many sequences."""
    folder, text = tmp_path / "model", tmp_path / "text"
    tiny_hf().save_pretrained(folder)
    tiny_tokenizer(folder)
    text.mkdir()
    words = torch.randint(4, VOCABULARY, (9, 331), generator=torch.Generator().manual_seed(6))
    documents = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
    (text / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    values = {
        "model_name": folder,
        "dataset_path": text,
        "streaming": False,
        "hook_name": RESIDUAL,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "target_l0": 7,
        "step_kernel": "sparse",
        "training_tokens": 300 * BATCH,  # it is to be stopped before it ends
        "train_batch_size_tokens": BATCH,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 17,
        "n_batches_in_buffer": 17,
        "n_batches_for_norm_estimate": 3,
        "exclude_special_tokens": True,
        "log_to_wandb": False,
        "wandb_log_frequency": 1,
        "verbose": False,
        "checkpoint_path": tmp_path / "checkpoints",
        "output_path": tmp_path / "output",
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "jumprelu_plugin.cli.app", "train", *flags]
    code, said = interrupted(command, tmp_path, signal.SIGINT)
    checkpoint = only_checkpoint(tmp_path)
    assert code == 130, said[-2000:]
    assert said.rstrip().endswith(f"continue with --resume_from_checkpoint {checkpoint}")
    assert "Traceback" not in said

    def finish(*more: str) -> JumpReLUTrainingRunner:
        cfg = run_config([*flags, *more], None, Command())
        runner = JumpReLUTrainingRunner(cfg)
        runner.run()
        return runner

    resumed = finish("--resume_from_checkpoint", str(checkpoint))
    whole = finish("--output_path", str(tmp_path / "whole"))
    assert_same_sae(resumed, whole)


# ---------------------------------------------------------------- signals, seen from inside


class Stopping(JumpReLUTrainingRunner):
    """Sends the process signals after a number of training batches."""

    after: int
    times: int = 1
    sent: signal.Signals = signal.SIGINT

    def run(self) -> Any:
        store, steps = self.activations_store, 0
        draw = type(store).__next__

        class Counting(type(store)):
            def __next__(inner) -> torch.Tensor:  # noqa: N805
                nonlocal steps
                batch, steps = draw(inner), steps + 1
                if steps == self.after:
                    for _ in range(self.times):
                        signal.raise_signal(self.sent)
                return batch

        store.__class__ = Counting
        return super().run()


@pytest.mark.parametrize(
    ("after", "times", "path", "message"),
    [
        (2, 1, True, "nothing was saved"),  # while the scale is estimated
        (9, 2, True, "nothing was saved"),  # twice: at once
        (9, 1, False, "checkpoint_path is None"),
        (9, 1, True, "continue with"),
    ],
)
def test_what_an_interruption_saves(
    model: Any, tmp_path: Path, after: int, times: int, path: bool, message: str
) -> None:
    checkpoints = tmp_path / "checkpoints"
    cfg = config(tmp_path, checkpoint_path=str(checkpoints) if path else None)
    runner = Stopping(cfg, override_dataset=token_rows(), override_model=model)
    runner.after, runner.times = after, times
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(InterruptedException, match=message):
        runner.run()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = list(checkpoints.glob("*/*"))
    # Three batches for the scale, so the ninth batch is the sixth step.
    assert [p.name for p in saved] == ([str(6 * BATCH)] if message == "continue with" else [])
    assert not (tmp_path / "output" / "cfg.json").exists()


def test_a_terminated_run_resumes_exactly(model: Any, tmp_path: Path) -> None:
    steps = 97
    cfg = {"training_tokens": steps * BATCH}
    runner = Stopping(config(tmp_path, **cfg), override_dataset=token_rows(), override_model=model)
    runner.after, runner.sent = 3 + 31, signal.SIGTERM
    with pytest.raises(InterruptedException, match="interrupted; continue with") as said:
        runner.run()
    checkpoint = only_checkpoint(tmp_path)
    assert checkpoint.name == str(31 * BATCH) and str(checkpoint) in str(said.value)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["metrics.jsonl"]
    assert steps_logged(tmp_path / "output") == list(range(31))

    again = config(tmp_path, resume_from_checkpoint=str(checkpoint), **cfg)
    resumed = run(model, again, token_rows())
    assert steps_logged(tmp_path / "output") == list(range(steps))
    assert_same_sae(resumed, run(model, config(tmp_path / "whole", **cfg), token_rows()))
