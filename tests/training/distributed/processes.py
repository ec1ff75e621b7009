"""Functions on several gloo processes.

They are forked from a server that has loaded torch and has no threads: the test process has, and a
lock that one of them holds at the fork is held in the child for ever.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import dill
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformer_lens", "sae_lens"])


def run_on(size: int, act: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `act(*arguments)` gives on each of `size` processes, which torchrun's variables name."""
    store = _store_of_torchrun()
    folder.mkdir(parents=True, exist_ok=True)
    given = size, store.port, act, folder, dill.dumps(arguments)
    start_processes(_child, given, size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def ended(
    size: int, act: Callable[..., Any], folder: Path, *arguments: Any
) -> tuple[list[int | None], str]:
    """How each of `size` processes ended that ran `act(rank, *arguments)`, and what they said."""
    store = _store_of_torchrun()
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "said.txt"
    said.touch()
    processes = [
        _CONTEXT.Process(
            target=_heard,
            args=(rank, size, store.port, act, said, dill.dumps((rank, *arguments))),
            daemon=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes], said.read_text()


def _store_of_torchrun() -> dist.TCPStore:
    """The store that torchrun's agent keeps, which outlives every process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _child(
    rank: int, size: int, port: int, act: Callable[..., Any], folder: Path, arguments: bytes
) -> None:
    _join(rank, size, port)
    torch.save(act(*dill.loads(arguments)), folder / f"{rank}.pt")


def _heard(
    rank: int, size: int, port: int, act: Callable[..., Any], said: Path, arguments: bytes
) -> None:
    _join(rank, size, port)
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
    act(*dill.loads(arguments))


def _join(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )


def grouped(act: Callable[..., Any]) -> Callable[..., Any]:
    """The same, inside a gloo group of all processes."""

    @functools.wraps(act)
    def inside(*arguments: Any) -> Any:
        dist.init_process_group("gloo", timeout=timedelta(minutes=2))
        try:
            return act(*arguments)
        finally:
            dist.destroy_process_group()

    return inside
