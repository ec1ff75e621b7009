"""The processes that torchrun started: who they are, and how they end together.

Whatever ends one of them ends all, and the first alone says why. What is wrong with the command is
found before anything is exchanged: every process tries, and all learn who failed (`agree`). A
process that dies later is noticed by the others in their next exchange.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from sae_lens.training._interruption import InterruptedException

from jumprelu_plugin.training.distributed.mesh import Mesh
from jumprelu_plugin.training.distributed.shares import require_positive

T = TypeVar("T")

# How long the others wait for what the first process does alone. A process that dies is noticed at
# once; gloo's half hour would end a run whose checkpoint of a terabyte takes longer.
_PATIENCE = timedelta(days=1)
# Of errors that another process's end causes, in PyTorch's words.
_OF_EXCHANGES = ("gloo", "NCCL", "onnection closed", "onnection reset", "Broken pipe", "Timed out")
_FAILURE = "jumprelu_failure"
_SAID = "jumprelu_said"


@dataclass(frozen=True)
class Launch:
    """The processes of one run.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank: its number on its machine.
        objects: a gloo group of all, for what is not a tensor of the training's device.
        store: torchrun's, through which a process that fails says so.
        mesh: who shares latents with whom, and tokens.
        again: how a run that ended goes on.
    """

    rank: int
    size: int
    local_rank: int
    objects: Any
    store: Any
    mesh: Mesh
    again: str = "the same command with --resume_from_checkpoint auto"

    def own(self, device: str | torch.device) -> str | torch.device:
        """The GPU of this process where a device says `cuda`; any other stays."""
        return f"cuda:{self.local_rank}" if str(device) == "cuda" else device

    def all_objects(self, value: T) -> list[T]:
        """What every process gives, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.objects)
        return found

    def agree(self, act: Callable[[], T]) -> T:
        """Act on every process; where one fails, all end, and the first says which and why.

        Raises:
            ValueError: on the first process, where one failed as a wrong input does.
            SystemExit: on the others.
        """
        result, error = None, None
        try:
            result = act()
        except Exception as raised:
            error = raised
        texts = self.all_objects(None if error is None else str(error) or type(error).__name__)
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if self.rank:
            raise SystemExit(2)
        if error is not None:
            raise error
        rank, text = failed[0]
        raise ValueError(f"process {rank}: {text}")

    def agree_on(self, what: str, digest: str) -> None:
        """Refuse a run whose processes do not have the same of something.

        Raises:
            ValueError: on the first process; SystemExit on the others.
        """
        others = [rank for rank, value in enumerate(self.all_objects(digest)) if value != digest]
        all_others = self.all_objects(others)[0]
        if not all_others:
            return
        if self.rank:
            raise SystemExit(2)
        raise ValueError(
            f"process {all_others[0]} has another {what} than process 0: start every process with "
            "the same command, files and versions"
        )

    def from_the_first(self, act: Callable[[], T]) -> T:
        """What the first process's act gives, on every process; its error too."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = act()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self.objects)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process set it."""
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.objects)
        return [bool(value) for value in values]

    def wait(self) -> None:
        """Wait until every process is here."""
        dist.barrier(group=self.objects)


def is_one_of_many() -> bool:
    """Whether torchrun started this process, and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def require_sizes(
    data_parallel_size: int, model_parallel_size: int, device: str, command: str = "train"
) -> None:
    """Raise ValueError for sizes, or a device, that the processes there are cannot have."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    require_positive(data_parallel_size, model_parallel_size)
    wanted = data_parallel_size * model_parallel_size
    if started != wanted:
        start = (
            f"start the run with torchrun --nproc-per-node {wanted} -m jumprelu_plugin {command} … "
            f"--data_parallel_size {data_parallel_size} "
            f"--model_parallel_size {model_parallel_size}"
        )
        raise ValueError(
            f"data_parallel_size {data_parallel_size} times model_parallel_size "
            f"{model_parallel_size} is {wanted}, and "
            + (
                f"torchrun started {started} processes: give sizes whose product is {started}"
                if started > 1
                else f"there is one process: {start}"
            )
        )
    if torch.device(device).type != "cuda":
        return
    if not dist.is_nccl_available():
        raise ValueError(
            f"device is {device}, and this PyTorch has no NCCL, through which GPUs exchange "
            "tensors: install a CUDA build of PyTorch, or give --device cpu"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", started))
    if here > 1 and torch.device(device).index is not None:
        raise ValueError(
            f"device is {device}, one GPU for {here} processes: give cuda, and each process takes "
            "the GPU of its own number"
        )
    if here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes were started on this machine, which has "
            f"{torch.cuda.device_count()} GPUs: start one a GPU"
        )


@contextmanager
def joined(
    data_parallel_size: int,
    model_parallel_size: int,
    device: str,
    again: str = Launch.again,
    command: str = "train",
) -> Iterator[Launch]:
    """Join the processes that torchrun started; within the block, an error of one ends them all.

    Args:
        data_parallel_size, model_parallel_size: of the mesh of all processes.
        device: of the training; on `cuda`, each process takes the GPU of its local rank.
        again, command: how a run that ended goes on, and how it is started, for messages.

    Raises:
        ValueError: the sizes or the device do not fit. On the first process, what ends the run.
        SystemExit: on the others.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        _be_silent()
    require_sizes(data_parallel_size, model_parallel_size, device, command)
    cuda = torch.device(device).type == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    store, rank, size = next(iter(dist.rendezvous("env://")))
    # Keys of an attempt that torchrun restarted are not this one's.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"jumprelu/{attempt}", store)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=None if cuda else _PATIENCE,  # NCCL's own: nothing waits for a disk in its group
    )
    objects = dist.new_group(backend="gloo", timeout=_PATIENCE) if cuda else None
    mesh = Mesh(data_parallel_size, model_parallel_size)
    launch = Launch(rank, size, local_rank, objects, store, mesh, again)
    try:
        yield launch
    except (SystemExit, InterruptedException, KeyboardInterrupt):
        raise
    except Exception as error:
        _end(launch, error)
    dist.destroy_process_group()


@contextmanager
def without_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM ends nothing where nobody listens to it.

    torchrun sends one to all that are left when a process dies, and what these have to say about it
    takes them a moment. A trainer still stops at the end of its step; after half a minute torchrun
    kills.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    except Exception:
        raise  # the process is about to end: it goes on ignoring the signal
    else:
        signal.signal(signal.SIGTERM, before)


def _end(launch: Launch, error: Exception) -> None:
    """Leave after an error: what all ran into is raised; where another process died, say that."""
    mine = f"{type(error).__name__}: {error}"
    if not _is_of_an_exchange(error):
        if launch.rank:
            if os.environ.get("JUMPRELU_TRACEBACK"):
                traceback.print_exception(error, file=sys.__stderr__)
            launch.store.set(_FAILURE, f"process {launch.rank}: {mine}")
            raise SystemExit(2 if isinstance(error, ValueError | OSError) else 1)
        raise error
    why, speaks = mine, not launch.rank
    try:
        if launch.store.check([_FAILURE]):
            why = launch.store.get(_FAILURE).decode()
        # Any process may be the one that died, so the first of the others to notice says it.
        speaks = launch.store.add(_SAID, 1) == 1
    except (RuntimeError, dist.DistError):
        pass  # torchrun itself is gone
    if speaks:
        print(
            f"a process of this run ended, and with it the run ({why}). Its last checkpoint, if it "
            f"has one, is whole: {launch.again} goes on from it",
            file=sys.__stderr__,
        )
    raise SystemExit(1) from error


def _is_of_an_exchange(error: Exception) -> bool:
    """Whether another process's end may have caused an error."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_EXCHANGES)


def _be_silent() -> None:
    """Leave the console to the first process."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    sys.stdout = sys.stderr = nowhere
    logging.disable(logging.CRITICAL)
