"""Functions on several gloo processes, forked, so that nothing is loaded again."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_on(size: int, act: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `act(*arguments)` gives on each of `size` processes, which torchrun's variables name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    start_processes(_child, (size, port, act, folder, arguments), size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _child(
    rank: int, size: int, port: int, act: Callable[..., Any], folder: Path, arguments: Any
) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.save(act(*arguments), folder / f"{rank}.pt")


def grouped(act: Callable[..., Any]) -> Callable[..., Any]:
    """The same, inside a gloo group of all processes."""

    def inside(*arguments: Any) -> Any:
        dist.init_process_group("gloo")
        try:
            return act(*arguments)
        finally:
            dist.destroy_process_group()

    return inside
