"""Small runs of the three trainings, in processes that can be killed, and what they leave.

A process takes ten seconds to import SAELens and a second to load a model. `forked` runs a training
in a child of a process that has done both, and calls what the command calls; `fresh` types the
command into a new Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from jumprelu_plugin import (
    CLTSettings,
    JumpReLUTrainingRunner,
    TranscoderSettings,
    train_clt,
    train_transcoders,
)
from jumprelu_plugin.training.checkpoints import numbered
from tests.tiny import D_MODEL, RESIDUAL, VOCABULARY, tiny_hf, tiny_hooked, tiny_tokenizer
from tests.training.runs import BATCH, CONTEXT, D_SAE, config, token_rows

STEPS = 48
PATIENCE = 3600.0  # seconds that a small run may take on a busy machine
POLL = 0.0005
# Of the run that is interrupted: a checkpoint in 5 steps, and on a busy machine some by the clock.
CHECKPOINTS, OFTEN = 9, 0.02
_SHARED: dict[str, Any] = {
    "training_tokens": STEPS * BATCH,
    "train_batch_size_tokens": BATCH,
    "context_size": CONTEXT,
    "store_batch_size_prompts": 17,
    "n_batches_in_buffer": 17,
    "n_batches_for_norm_estimate": 3,
    "lr": 3e-3,
}
_LAYERS: dict[str, Any] = {
    **_SHARED,
    "model_name": "tiny",
    "d_sae": D_SAE,
    "target_l0": 7.0,
    "evaluation_sequences": 0,
    "step_kernel": "sparse",
}


@cache
def model() -> Any:
    """The random Gemma 2 of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        return tiny_hooked(tiny_hf(), tiny_tokenizer(Path(folder)))


@cache
def text() -> Any:
    return token_rows()


def _train(folder: Path, checkpoints: int, minutes: float) -> None:
    cfg = config(
        folder,
        **_SHARED,
        lr_decay_steps=10,
        n_checkpoints=checkpoints // 3,
        resume_from_checkpoint="auto",
    )
    JumpReLUTrainingRunner(
        cfg, text(), model(), check_first=False, checkpoint_every_n_minutes=minutes
    ).run()


def _train_transcoders(folder: Path, checkpoints: int, minutes: float) -> None:
    settings = TranscoderSettings(
        **_LAYERS, n_checkpoints=checkpoints, checkpoint_every_n_minutes=minutes
    )
    train_transcoders(folder / "output", settings, model=model(), dataset=text())


def _train_clt(folder: Path, checkpoints: int, minutes: float) -> None:
    settings = CLTSettings(**_LAYERS, n_checkpoints=checkpoints, checkpoint_every_n_minutes=minutes)
    train_clt(folder / "output", settings, model=model(), dataset=text())


@dataclass(frozen=True)
class Kind:
    """One of the trainings.

    Attributes:
        run: starts it in a folder, or goes on with what is there, with so many checkpoints and so
            many minutes between two others.
        finished: the file that a finished run leaves in its folder.
        weights: the files of its result, as a pattern.
        checkpoints: the folders that they are in, as a pattern.
    """

    run: Callable[[Path, int, float], None]
    finished: str
    weights: str
    checkpoints: str

    def is_finished(self, folder: Path) -> bool:
        return (folder / self.finished).exists()

    def result(self, folder: Path) -> dict[str, Tensor]:
        """The weights of a finished run."""
        return {
            f"{path.relative_to(folder)} {name}": value
            for path in sorted(folder.glob(self.weights))
            for name, value in load_file(path).items()
        }

    def saved(self, folder: Path) -> list[Path]:
        """A run's checkpoints, the newest last."""
        found = [path for run in folder.glob(self.checkpoints) for path in numbered(run)]
        return sorted(found, key=lambda path: int(path.name))

    def unfinished(self, folder: Path) -> list[Path]:
        """Checkpoints in the middle of being written, renamed or removed."""
        return [path for run in folder.glob(self.checkpoints) for path in run.glob(".[0-9]*-*")]


KINDS = {
    "train": Kind(_train, "output/cfg.json", "output/sae_weights.safetensors", "checkpoints/*"),
    "train-transcoders": Kind(
        _train_transcoders,
        "output/transcoders.json",
        "output/layer_*/sae_weights.safetensors",
        "output/checkpoints",
    ),
    "train-clt": Kind(
        _train_clt,
        "output/cross_layer_record.json",
        "output/layer_*.safetensors",
        "output/checkpoints",
    ),
}


def command(sources: Path, folder: Path, checkpoints: int, minutes: float) -> list[str]:
    """What is typed after `jumprelu`; the same for the first start and for resuming."""
    given = {
        **_SHARED,
        "model_name": sources / "model",
        "dataset_path": sources / "text",
        "streaming": False,
        "hook_name": RESIDUAL,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "target_l0": 7,
        "step_kernel": "sparse",
        "exclude_special_tokens": True,
        "log_to_wandb": False,
        "verbose": False,
        "n_checkpoints": checkpoints // 3,
        "checkpoint_every_n_minutes": minutes,
        "checkpoint_path": folder / "checkpoints",
        "output_path": folder / "output",
        "resume_from_checkpoint": "auto",
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return ["train", *flags]


def write_sources(folder: Path) -> Path:
    """The model with its tokenizer, and documents that span many sequences, for the command."""
    tiny_hf().save_pretrained(folder / "model")
    tiny_tokenizer(folder / "model")
    (folder / "text").mkdir()
    words = torch.randint(4, VOCABULARY, (9, 331), generator=torch.Generator().manual_seed(6))
    lines = [json.dumps({"text": " ".join(f"w{w}" for w in row)}) for row in words.tolist()]
    (folder / "text" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


# ---------------------------------------------------------------- processes


@dataclass
class Child:
    """A process that runs a command, and what it has printed.

    Attributes:
        code: its exit code, negative for a signal; None while it runs.
    """

    pid: int
    log: Path
    code: int | None = None
    started: float = field(default_factory=time.monotonic)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait(self) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it does not end.
        """
        while self.running():
            if time.monotonic() - self.started > PATIENCE:
                self.kill()
                raise TimeoutError(f"{self.log} of a process that did not end")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def wait_until(self, there: Callable[[], bool]) -> bool:
        """Whether something is there before the process ends."""
        while not there():
            if not self.running() or time.monotonic() - self.started > PATIENCE:
                return False
            time.sleep(POLL)
        return True

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def forked(act: Callable[[], None], log: Path) -> Child:
    """Do it in a child of this process, which must have started no threads.

    What the command would say in one line, with exit code 2, is said so.
    """
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        act()
        code = 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fresh(arguments: list[str], log: Path) -> Child:
    """The command in a new Python."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jumprelu_plugin.cli.app", *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    process.returncode = 0  # `Child` waits for it
    return Child(process.pid, log)
