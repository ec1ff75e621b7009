"""A training over a model's layers looked at before it starts: `--check_only`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table

from jumprelu_plugin.training.distributed.hardware import Hardware
from jumprelu_plugin.training.health.machine import available
from jumprelu_plugin.training.health.memory import size
from jumprelu_plugin.training.health.preflight import named_rows
from jumprelu_plugin.transcoders.memory import MemoryEstimate

# What makes each part of the memory smaller.
_CHANGES = {
    "model": "a smaller model, or dtype=bfloat16,",
    "transcoders": "a smaller d_sae, fewer layers, or more processes that share the latents",
    "chunk": "a smaller n_batches_in_buffer",
    "working": "a smaller train_batch_size_tokens or store_batch_size_prompts",
}


@dataclass(frozen=True)
class LayerPlan:
    """What a training will take.

    Attributes:
        processes: that train together.
        memory: of each.
        room: bytes that each can have; None if not known.
        place: whose memory that is.
        numbers: what else there is to say, by name.
    """

    processes: int
    memory: MemoryEstimate
    room: int | None
    place: str
    numbers: tuple[tuple[str, str], ...]

    def table(self) -> Table:
        """For the console."""
        title = "One process" if self.processes == 1 else f"{self.processes} processes"
        of = "" if self.room is None else f" of {size(self.room)} on {self.place}"
        return named_rows(title, [*self.numbers, ("memory of each", f"{self.memory}{of}")])

    def refuse(self) -> None:
        """Raise ValueError if it does not fit."""
        if self.room is None or self.memory.total <= self.room:
            return
        parts = vars(self.memory)
        largest = max(parts, key=lambda name: parts[name])
        raise ValueError(
            f"each of {self.processes} processes takes {self.memory} at its peak, and "
            f"{size(self.room)} can be had on {self.place}: {_CHANGES[largest]} helps most"
        )


def room_of_each(device: str, processes: int, gpu: Hardware | None) -> tuple[int | None, str]:
    """Bytes that each process can have, and whose memory that is.

    Args:
        device: of the run; processes on a CPU share its memory.
        gpu: that the run is planned for, in place of this machine's device.
    """
    if gpu is not None:
        return int(gpu.memory), gpu.name
    room = available(torch.device(device))
    if room is None or torch.device(device).type != "cpu":
        return room, device
    return room // processes, device
