"""Which path computes a step: decided by timing real steps, not by a table of devices and shapes.

Both paths give the same numbers, so trying one costs nothing but its own time. The dense step takes
the same time at any density; the sparse step gets cheaper as fewer pairs are active. So: time a few
steps of each, keep the faster, and time the sparse step again whenever the density has fallen well
below where it last lost.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Path = Literal["dense", "sparse"]
PATHS: tuple[str, ...] = ("auto", "dense", "sparse")

# The first step of a path pays for page faults and library start-up; it is run and not counted.
WARM_UP_STEPS = 1
TIMED_STEPS = 3
# A path that lost is tried again once density has moved this far in its favour.
RETRY_RATIO = 0.7


class PathChoice:
    """Chooses the path of each step from the time the steps before it took.

    Args:
        forced: "dense" or "sparse" always takes that path; "auto" measures.
    """

    def __init__(self, forced: str = "auto"):
        if forced not in PATHS:
            raise ValueError(f"step path is {forced!r}; it must be one of {', '.join(PATHS)}")
        self.forced = forced
        self._device = torch.device("cpu")
        self._samples: dict[Path, list[float]] = {"sparse": [], "dense": []}
        self._chosen: Path | None = None
        self._lost_at_density: float | None = None
        self._density = 1.0
        self._running: Path = "sparse"
        self._started: float | None = None

    @property
    def measuring(self) -> bool:
        """Whether the next steps are being timed."""
        return self.forced == "auto" and self._chosen is None

    def start(self, device: torch.device) -> Path:
        """The path to take now; call at the start of a step on `device`.

        While a path is being timed, the device's work is awaited before the clock is read.
        """
        self._device = device
        if self.forced != "auto":
            return self.forced  # type: ignore[return-value]
        if self._chosen is not None:
            self._running = self._chosen
            return self._chosen
        needed = WARM_UP_STEPS + TIMED_STEPS
        self._running = "sparse" if len(self._samples["sparse"]) < needed else "dense"
        self._wait()
        self._started = time.perf_counter()
        return self._running

    def finish(self, density: float) -> None:
        """Call when the gradients of the step are there, with its share of non-zero pairs."""
        self._density = density
        if self.forced != "auto":
            return
        if self._chosen is None and self._started is not None:
            self._wait()
            self._samples[self._running].append(time.perf_counter() - self._started)
            self._started = None
            self._decide()
        elif self._chosen == "dense" and self._lost_at_density is not None:
            if density < RETRY_RATIO * self._lost_at_density:
                self._samples["sparse"].clear()
                self._chosen = None

    def _decide(self) -> None:
        needed = WARM_UP_STEPS + TIMED_STEPS
        if any(len(times) < needed for times in self._samples.values()):
            return
        took = {path: statistics.median(t[WARM_UP_STEPS:]) for path, t in self._samples.items()}
        self._chosen = "sparse" if took["sparse"] <= took["dense"] else "dense"
        self._lost_at_density = self._density if self._chosen == "dense" else None
        logger.info(
            "step path: %s (sparse %.1f ms, dense %.1f ms, %.2f %% of pairs active)",
            self._chosen,
            1e3 * took["sparse"],
            1e3 * took["dense"],
            100 * self._density,
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
