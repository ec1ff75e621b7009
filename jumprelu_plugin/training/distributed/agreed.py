"""What the processes of a run decide together: when to stop, and when the first saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import override

from jumprelu_plugin.training.checkpoints import Checkpoints
from jumprelu_plugin.training.distributed.launch import Launch
from jumprelu_plugin.training.interruption import InterruptibleIterator


class AgreedBatches(InterruptibleIterator):
    """Stops every process before the same step, whichever was asked to stop."""

    launch: Launch

    @override
    def stops(self) -> bool:
        return self.launch.any_of(super().stops())[0]


class CheckpointsByTheFirst(Checkpoints):
    """Checkpoints that the first process writes, when they are due by its clock.

    Every process calls `due` and `save`, and learns what came of it.

    Args:
        launch: these processes.
        parts: of `Checkpoints`.
    """

    def __init__(self, launch: Launch, *parts: Any):
        super().__init__(*parts)
        self.launch = launch

    @override
    def due(self) -> bool:
        return self.launch.any_of(self.launch.rank == 0 and super().due())[0]

    @override
    def save(
        self, name: str, write: Callable[[Path], Any], *, replaceable: bool = True
    ) -> Path | None:
        def on_the_first() -> tuple[Path | None, Path | None]:
            found = super(CheckpointsByTheFirst, self).save(name, write, replaceable=replaceable)
            return found, self.last

        saved, self.last = self.launch.from_the_first(on_the_first)
        return saved
