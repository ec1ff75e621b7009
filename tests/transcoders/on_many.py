"""A run on many processes, as one of them sees it, and what its folder shares with another's."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens.training._interruption import InterruptedException


@contextmanager
def stopped_by_the_last(
    trainer: type[Any], method: str, step: str, stop_at: int | None
) -> Iterator[None]:
    """Within the block Ctrl-C reaches the last process when its trainer calls `method` at a step.

    Args:
        step: the trainer's attribute that counts steps.
    """
    own = getattr(trainer, method)

    def stopping(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.launch.rank == self.launch.size - 1 and getattr(self, step) == stop_at:
            signal.raise_signal(signal.SIGINT)
        own(self, *args, **kwargs)

    setattr(trainer, method, stopping)
    try:
        yield
    finally:
        setattr(trainer, method, own)


def how_it_ended(run: Callable[[], Any]) -> str:
    """`finished`, or the exception that ended it."""
    try:
        run()
    except (InterruptedException, SystemExit, ValueError) as error:
        return f"{type(error).__name__} {error}"
    return "finished"


def assert_same_files(found: Path, expected: Path) -> None:
    names, others = (sorted(path.name for path in folder.iterdir()) for folder in (found, expected))
    assert names == others


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
