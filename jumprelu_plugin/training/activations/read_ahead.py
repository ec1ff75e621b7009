"""Activations that a thread draws from the model before training asks for them.

SAELens' prefetch queue holds batches that a checkpoint does not know of, so a resumed run would
skip them. Here a thread runs the model alone; mixing and shuffling, which draw random numbers, stay
where they were. Each pass of the model comes with the place in the text after it, and a checkpoint
has the place of the last one that was mixed in: the run is the same as without, and resumes
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from jumprelu_plugin.models.devices import same_device

Place = dict[str, Tensor]


class ReadAhead(Iterator[Tensor]):
    """The items of `source`, some of them drawn in advance by SAELens' prefetching thread.

    The thread starts with the first item that is asked for. Its errors are raised here.

    Args:
        place: where the source is in the text, after the item that it gave last.
        ahead: items that wait at most.

    Attributes:
        reached: the place after the last item that was handed out; None before the first.
    """

    def __init__(self, source: Iterator[Tensor], place: Callable[[], Place], ahead: int):
        self._source, self._place, self._ahead = source, place, ahead
        self._items: PrefetchingIterator[tuple[Tensor, Place]] | None = None
        self.reached: Place | None = None

    def __next__(self) -> Tensor:
        if self._items is None:
            self._items = PrefetchingIterator(self._with_places(), self._ahead)
        item, self.reached = next(self._items)
        return item

    def _with_places(self) -> Iterator[tuple[Tensor, Place]]:
        for item in self._source:
            yield item, self._place()

    def paused(self) -> AbstractContextManager[None]:
        """Leave the model alone meanwhile; waits for the end of a pass."""
        return nullcontext() if self._items is None else self._items.paused()

    def close(self) -> None:
        """Stop the thread, after the pass that it is in."""
        if self._items is not None:
            self._items.close()


class PausingEvaluator:
    """An evaluator of a run whose store reads ahead: it has the model, and text, to itself."""

    def __init__(self, evaluator: Any, store: Any):
        self._evaluator, self._store = evaluator, store
        evaluator.activations_store = store.for_evaluation()

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        with self._store.paused():
            return self._evaluator(*args, **keywords)


def passes_ahead(cfg: Any) -> int:
    """Passes of the model that wait while training goes on.

    As many as `cfg.prefetch_llm_batches` says. By default it is as many as fill the mixing buffer
    again where the model or the buffer is on another device than what is trained, so that one works
    while the other does; none where all are on one.
    """
    asked = cfg.prefetch_llm_batches
    if asked:
        return int(asked)
    others = (cfg.llm_device or cfg.device, cfg.act_store_device or cfg.device)
    if all(same_device(name, cfg.device) for name in others):
        return 0
    sequences = cfg.n_batches_in_buffer * (1 - cfg.activations_mixing_fraction)
    return max(1, math.ceil(sequences / cfg.store_batch_size_prompts))
