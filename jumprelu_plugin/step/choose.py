"""Which path computes a step: decided by timing real steps, not by a table of devices and shapes.

    dense      every pair, `reference.py`
    sparse     the pairs that matter, found by a full-precision product
    screened   the same pairs, found by a bfloat16 product and checked in full precision

All three give the same numbers, so trying one costs nothing but its own time. The dense step takes
the same time at any density, the others less the fewer pairs are active. So: time a few steps of
each, keep the fastest, and ask again when the density has halved or doubled.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Path = Literal["sparse", "screened", "dense"]
_ALL: tuple[Path, ...] = ("sparse", "screened", "dense")
PATHS: tuple[str, ...] = ("auto", *_ALL)

# The first step of a path pays for page faults and library start-up; it is run and not counted.
WARM_UP_STEPS = 1
TIMED_STEPS = 3
# Density has to change by this factor before the paths that depend on it are timed again.
RETRY_FACTOR = 2.0


class PathChoice:
    """Chooses the path of each step from the time the steps before it took.

    Args:
        forced: the name of a path always takes it; "auto" measures.

    Raises:
        ValueError: there is no such path.
    """

    def __init__(self, forced: str = "auto"):
        if forced not in PATHS:
            raise ValueError(f"step path is {forced!r}; it must be one of {', '.join(PATHS)}")
        self.current: Path = "sparse" if forced == "auto" else forced  # type: ignore[assignment]
        self._forced = forced != "auto"
        self._device = torch.device("cpu")
        self._seconds: dict[Path, list[float]] = {path: [] for path in _ALL}
        self._decided_at: float | None = None
        self._started: float | None = None

    @property
    def measuring(self) -> bool:
        """Whether the next steps are being timed."""
        return not self._forced and self._decided_at is None

    def start(self, device: torch.device) -> Path:
        """The path to take now; call at the start of a step on `device`.

        While paths are being timed, the device's work is awaited before the clock is read.
        """
        if self.measuring:
            self.current = next(path for path in _ALL if self._untimed(path))
            self._device = device
            self._wait()
            self._started = time.perf_counter()
        return self.current

    def finish(self, density: float) -> None:
        """Call when the gradients of the step are there, with its share of active pairs."""
        if self.measuring and self._started is not None:
            self._wait()
            self._seconds[self.current].append(time.perf_counter() - self._started)
            self._started = None
            if not any(map(self._untimed, _ALL)):
                self._decide(density)
        elif self._outdated(density):
            self._decided_at = None
            for path in ("sparse", "screened"):
                self._seconds[path].clear()

    def _untimed(self, path: Path) -> bool:
        return len(self._seconds[path]) < WARM_UP_STEPS + TIMED_STEPS

    def _outdated(self, density: float) -> bool:
        if self._decided_at is None:
            return False
        return not 1 / RETRY_FACTOR < density / self._decided_at < RETRY_FACTOR

    def _decide(self, density: float) -> None:
        took = {path: statistics.median(s[WARM_UP_STEPS:]) for path, s in self._seconds.items()}
        self.current = min(_ALL, key=took.__getitem__)
        self._decided_at = max(density, 1e-12)
        times = ", ".join(f"{path} {1e3 * seconds:.1f} ms" for path, seconds in took.items())
        logger.info("step path: %s at %.3g %% density (%s)", self.current, 100 * density, times)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
