"""Trains several SAEs at one time: batches are read once, and each thread takes one SAE's step.

Stacking encoders into one product saves nothing on a CPU: it is 12 % of a step, eight stacked are
as much work as eight, and the rest of a step works on numbers that belong to one SAE, its weights,
gradients, moments and active pairs (docs/results.md). What can be saved is waiting. The threads of
one SAE's step wait for each other at the end of every operator, which costs most where other
processes run: eight steps took 8.2 s of CPU time on two threads and 3.8 s on one thread each. So
the threads are divided among the SAEs instead of among the numbers of one, and each SAE's step is
what it would be alone with that many threads, in the same order of batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from jumprelu_plugin.studies.sweep.training import (
    SAMPLES,
    SAETraining,
    TrainingRun,
    needs_input_scale,
)

# Steps that an SAE may be ahead of the slowest, so that no thread waits at the end of each batch.
# As many batches are kept.
AHEAD = 4


def train_together(
    saes: Sequence[Any],
    sources: Sequence[Iterator[Float[Tensor, "batch d"]]],
    cfg: SAETrainerConfig,
    *,
    on_step: Callable[[int], None] | None = None,
    samples: int = SAMPLES,
) -> list[TrainingRun]:
    """Train SAEs in place with SAELens' trainer, each as `train` would.

    The first step of each, which calibrates and finds its optimizer, is taken in turn.

    Args:
        saes: with any fields.
        sources: endless batches for each; SAEs given the same iterator read the same batches. The
            scale of their input, where they need one, is estimated once.
        cfg: of every trainer.
        on_step: called with an SAE's place after each of its steps, never twice at one time.
        samples: about how many steps of each are sampled.

    Raises:
        ValueError: of the SAEs that read the same batches only some need the scale of their input,
            which takes the first batches.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    trainings = trainings_of(saes, sources, cfg, samples)
    JointSteps(trainings, sources, on_step).take()
    share = 1 / len(trainings)
    for training in trainings:
        training.finish()
        training.run.trained_together = len(trainings)
        training.run.seconds = share * (time.perf_counter() - wall)
        training.run.cpu_seconds = share * (time.process_time() - cpu)
    return [training.run for training in trainings]


def trainings_of(
    saes: Sequence[Any],
    sources: Sequence[Iterator[Float[Tensor, "batch d"]]],
    cfg: SAETrainerConfig,
    samples: int = SAMPLES,
) -> list[SAETraining]:
    """A training for each SAE, with one estimate of the input's scale for each source."""
    trainings: list[SAETraining] = []
    for place, (sae, source) in enumerate(zip(saes, sources, strict=True)):
        first = next(i for i, other in enumerate(sources) if other is source)
        if needs_input_scale(sae) != needs_input_scale(saes[first]):
            raise ValueError(
                "some SAEs estimate the scale of their input from the first batches and others do "
                "not (normalize_activations): give them batches of their own"
            )
        scale = trainings[first].scaling_factor if first < place else None
        trainings.append(SAETraining(sae, cfg, source, samples, scale))
    return trainings


class JointSteps:
    """Takes steps of several SAEs on several threads: the SAE that is furthest behind, and in no
    step at the moment, is next.

    Args:
        trainings: one an SAE, none with a step taken yet.
        sources: endless batches for each; SAEs given the same iterator read the same batches.
        on_step: called with an SAE's place after each of its steps.
    """

    def __init__(
        self,
        trainings: Sequence[SAETraining],
        sources: Sequence[Iterator[Tensor]],
        on_step: Callable[[int], None] | None = None,
    ):
        self._trainings, self._sources, self._on_step = trainings, sources, on_step
        self._read: dict[int, list[Tensor]] = {id(source): [] for source in sources}
        self._forgotten = 0  # batches of each source that all SAEs have had
        self._changed = threading.Condition()
        self._busy: set[int] = set()
        self._stopped = False
        self._until = 0

    def take(self, until: int | None = None) -> None:
        """Take steps until each SAE has taken `until`, or all of its training's.

        An exception in one ends them all.
        """
        self._stopped = False
        self._until = min(training.total for training in self._trainings)
        if until is not None:
            self._until = min(self._until, until)
        for place, training in enumerate(self._trainings):
            if not training.steps:
                self._take(place)
        threads = torch.get_num_threads()
        workers = min(threads, len(self._trainings))
        try:
            # A thread has its own number of threads for operators.
            with ThreadPoolExecutor(
                workers, "sae", torch.set_num_threads, (threads // workers,)
            ) as pool:
                running = [pool.submit(self._work) for _ in range(workers)]
                try:
                    for worker in running:
                        worker.result()
                finally:
                    self._stop()  # also on Ctrl-C, which arrives here
        finally:
            torch.set_num_threads(threads)

    def _work(self) -> None:
        try:
            while (place := self._wait_for_next()) is not None:
                self._take(place)
        except BaseException:
            self._stop()  # the others would wait for this one
            raise

    def _wait_for_next(self) -> int | None:
        with self._changed:
            while not self._stopped:
                left = [i for i, one in enumerate(self._trainings) if one.steps < self._until]
                if not left:
                    return None
                behind = min(self._trainings[place].steps for place in left)
                ready = [
                    place
                    for place in left
                    if place not in self._busy and self._trainings[place].steps < behind + AHEAD
                ]
                if ready:
                    place = min(ready, key=lambda i: self._trainings[i].steps)
                    self._busy.add(place)
                    return place
                self._changed.wait()
        return None

    def _take(self, place: int) -> None:
        with self._changed:
            batch = self._batch(place)
        self._trainings[place].step(batch)
        with self._changed:
            self._busy.discard(place)
            self._forget()
            if self._on_step is not None:
                self._on_step(place)
            self._changed.notify_all()

    def _batch(self, place: int) -> Tensor:
        source = self._sources[place]
        kept = self._read[id(source)]
        index = self._trainings[place].steps - self._forgotten
        while len(kept) <= index:
            kept.append(next(source))
        return kept[index]

    def _forget(self) -> None:
        had = min(training.steps for training in self._trainings)
        for kept in self._read.values():
            del kept[: had - self._forgotten]
        self._forgotten = had

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
