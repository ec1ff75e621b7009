"""Ctrl-C and SIGTERM as a request to stop, which a training meets at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sae_lens.training._interruption import InterruptedException
from torch import Tensor

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM to `handler` during the block; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


class InterruptibleIterator:
    """An iterator that stops on request, before it takes the next item from `source`.

    Args:
        how_to_go_on: for who stopped it.

    Raises:
        InterruptedException: in place of the next item, after a request to stop.
    """

    def __init__(
        self,
        source: Iterator[dict[str, Tensor]],
        how_to_go_on: str = "the same command goes on from the last step",
    ):
        self._source, self._how_to_go_on = source, how_to_go_on
        self._stop_requested = False

    def __iter__(self) -> InterruptibleIterator:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.stops():
            raise InterruptedException(f"interrupted; {self._how_to_go_on}")
        return next(self._source)

    def stops(self) -> bool:
        """Whether the training is to stop before the next item."""
        return self._stop_requested

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM; a second signal ends the run at once."""
        with stop_signals_to(self._request_stop):
            yield

    def _request_stop(self, signal_number: int, frame: Any) -> None:
        if self._stop_requested:
            # Not SAELens' exception, after which a checkpoint is saved: this is inside a step.
            raise KeyboardInterrupt
        self._stop_requested = True
