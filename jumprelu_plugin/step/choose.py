"""Which path computes a step: decided by timing real steps, not by a table of devices and shapes.

    sparse     the pairs that matter, found by a full-precision product
    screened   the same pairs, found by a bfloat16 product and checked in full precision
    dense      every pair, `dense.py`

All three give the same numbers, so trying one costs nothing but its own time. The dense step takes
the same time at any density, the others less the fewer pairs are active. So: time a few steps of
each, keep the fastest, and ask again when the density has halved or doubled.

A dense step also needs several times the memory and is the slowest by far when few pairs are
active. It is tried only where it could win: where every step of the others took longer than the
products alone that a dense step is made of, each timed on this device (`product.py`).
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Literal

import torch

from jumprelu_plugin.step import product

logger = logging.getLogger(__name__)

StepPath = Literal["sparse", "screened", "dense"]
_ALL: tuple[StepPath, ...] = ("sparse", "screened", "dense")
STEP_PATHS: tuple[str, ...] = ("auto", *_ALL)

# The first step of a path pays for page faults and library start-up; it is run and not counted.
WARM_UP_STEPS = 1
TIMED_STEPS = 3
# Density has to change by this factor before the paths that depend on it are timed again.
RETRY_FACTOR = 2.0
# [batch, d_in, d_sae] products in a dense step: encode, decode, and the gradients of the
# activations, of W_dec and of W_enc.
DENSE_PRODUCTS = 5


class PathChoice:
    """Chooses the path of each step from the time the steps before it took.

    Args:
        forced: the name of a path always takes it; "auto" measures.

    Raises:
        ValueError: there is no such path.
    """

    def __init__(self, forced: str = "auto"):
        if forced not in STEP_PATHS:
            raise ValueError(f"step path is {forced!r}; it must be one of {', '.join(STEP_PATHS)}")
        self.current: StepPath = "sparse" if forced == "auto" else forced  # type: ignore[assignment]
        self._forced = forced != "auto"
        self._logged = False
        self._device = torch.device("cpu")
        self._sizes: tuple[int, int, int] | None = None
        self._seconds: dict[StepPath, list[float]] = {path: [] for path in _ALL}
        self._decided_at: float | None = None
        self._started: float | None = None

    @property
    def measuring(self) -> bool:
        """Whether the next steps are being timed."""
        return not self._forced and self._decided_at is None

    def start(self, device: torch.device, sizes: tuple[int, int, int] | None = None) -> StepPath:
        """The path to take now; call at the start of a step on `device`.

        `sizes` are (batch, d_in, d_sae). While paths are being timed, the device's work is awaited
        before the clock is read.
        """
        if self._forced and not self._logged:
            self._logged = True
            logger.info("step path: %s, as asked for", self.current)
        if self.measuring:
            self._sizes = sizes
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

    def _untimed(self, path: StepPath) -> bool:
        if len(self._seconds[path]) == WARM_UP_STEPS + TIMED_STEPS:
            return False
        if path != "dense" or self._untimed("sparse") or self._untimed("screened"):
            return True
        # The fastest of all their steps: a busy machine must not look like a reason to try it.
        fastest = min(s for p in ("sparse", "screened") for s in self._seconds[p][WARM_UP_STEPS:])
        return fastest > self._least_dense_seconds()

    def _least_dense_seconds(self) -> float:
        """What the products of a dense step take: no dense step is faster. 0 if not known."""
        one = None if self._sizes is None else product.seconds(*self._sizes)
        return 0.0 if one is None else DENSE_PRODUCTS * one

    def _median(self, path: StepPath) -> float:
        return statistics.median(self._seconds[path][WARM_UP_STEPS:])

    def _outdated(self, density: float) -> bool:
        if self._decided_at is None:
            return False
        return not 1 / RETRY_FACTOR < density / self._decided_at < RETRY_FACTOR

    def _decide(self, density: float) -> None:
        took: dict[StepPath, float] = {
            path: self._median(path) for path in _ALL if self._seconds[path]
        }
        self.current = min(took, key=lambda path: took[path])
        self._decided_at = max(density, 1e-12)
        times = [f"{path} {1e3 * seconds:.1f} ms" for path, seconds in took.items()]
        if "dense" not in took:
            least = 1e3 * self._least_dense_seconds()
            times.append(f"dense not tried: at least {least:.1f} ms of products")
        library = None if self._sizes is None else product.backend(self._sizes[1])
        if library is not None:
            times.append(f"encoder product by {library}")
        logger.info(
            "step path: %s at %.3g %% density (%s)", self.current, 100 * density, ", ".join(times)
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
