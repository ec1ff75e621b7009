"""Chooses the path that computes each step, by timing real steps.

    sparse     only the pairs that matter, found by a product in full precision
    screened   the same pairs, found by a bfloat16 product and checked in full precision
    triton     as screened, by kernels for a GPU (`kernels/`); only where they run
    dense      every pair (`dense.py`)

All paths give the same numbers, so trying one costs only its time. The dense step takes the
same time at any density; the others take less time the fewer pairs are active. With `auto`, a few
steps of each path are timed, the path of the fastest step is kept, and the paths are timed again
when the density has halved or doubled. Each path is judged by its fastest step, not its median:
on a busy machine a step can take many times what it needs, and never takes less. The fast
paths take turns, so that a slow second, such as the first one beside a busy process
(`spinning.py`), slows each of them.

A dense step also needs several times the memory and is by far the slowest when few pairs are
active. It is therefore tried only where it could win: where every step of the others took longer
than the matrix products in a dense step would, whose time is measured on this device
(`product.py`).
"""

from __future__ import annotations

import logging
import time
from typing import Literal

import torch

from jumprelu_plugin.step import kernels, product, spinning

logger = logging.getLogger(__name__)

StepPath = Literal["sparse", "screened", "triton", "dense"]
_ALL: tuple[StepPath, ...] = ("sparse", "screened", "triton", "dense")
# Values of the configs' `step_kernel`.
STEP_PATHS: tuple[str, ...] = ("auto", *_ALL)

# The first step of a path includes page faults and library start-up, so it is not counted.
WARM_UP_STEPS = 1
TIMED_STEPS = 3
# The paths are timed again once the density has changed by this factor.
RETRY_FACTOR = 2.0
# [batch, d_in, d_sae] products in a dense step: encode, decode, and the gradients of the
# activations, of W_dec and of W_enc.
DENSE_PRODUCTS = 5


class PathChoice:
    """Chooses the path of each step from the times of earlier steps.

    Call `start` at the beginning of a step and `finish` when its gradients are computed.

    Args:
        step_kernel: one of `STEP_PATHS`; `auto` measures, any other name is always used.

    Attributes:
        current: the path of the current step.

    Raises:
        ValueError: there is no such path; or, when a step starts, it does not run on the device.
    """

    def __init__(self, step_kernel: str = "auto"):
        if step_kernel not in STEP_PATHS:
            raise ValueError(
                f"step_kernel is {step_kernel!r}; it must be one of {', '.join(STEP_PATHS)}"
            )
        self._forced = step_kernel != "auto"
        self.current: StepPath = step_kernel if self._forced else "sparse"  # type: ignore[assignment]
        self._logged = False
        self._device = torch.device("cpu")
        self._sizes: tuple[int, int, int] | None = None
        self._seconds: dict[StepPath, list[float]] = {path: [] for path in _ALL}
        self._decided_density: float | None = None
        self._started: float | None = None

    @property
    def measuring(self) -> bool:
        """Whether the next step will be timed."""
        return not self._forced and self._decided_density is None

    def start(self, device: torch.device, sizes: tuple[int, int, int] | None = None) -> StepPath:
        """Return the path of the step that starts now.

        While paths are timed, this waits for the device's earlier work before it reads the clock.

        Args:
            device: where the step runs.
            sizes: (batch, d_in, d_sae), from which the least time of a dense step follows.
        """
        if device.type == "cpu":
            spinning.adapt()
        if self._forced and not self._logged:
            self._logged = True
            if self.current == "triton":
                kernels.require_available(device)
            logger.info("step path: %s, as configured", self.current)
        if self.measuring:
            self._sizes, self._device = sizes, device
            left: list[StepPath] = [path for path in self._candidates() if self._needs_timing(path)]
            fast: list[StepPath] = [path for path in left if path != "dense"]
            self.current = min(fast or left, key=lambda path: len(self._seconds[path]))
            product.synchronize(self._device)
            self._started = time.perf_counter()
        return self.current

    def finish(self, density: float) -> None:
        """End the step; `density` is its fraction of active pairs."""
        if self.measuring and self._started is not None:
            product.synchronize(self._device)
            self._seconds[self.current].append(time.perf_counter() - self._started)
            self._started = None
            if not any(map(self._needs_timing, self._candidates())):
                self._decide(density)
        elif self._density_changed(density):
            self._decided_density = None
            for path in self._fast():
                self._seconds[path].clear()

    def _candidates(self) -> tuple[StepPath, ...]:
        """The paths that `auto` chooses from on this device; an interpreted kernel is none."""
        by_kernels = self._device.type == "cuda" and kernels.available(self._device)
        return tuple(path for path in _ALL if path != "triton" or by_kernels)

    def _fast(self) -> tuple[StepPath, ...]:
        return tuple(path for path in self._candidates() if path != "dense")

    def _needs_timing(self, path: StepPath) -> bool:
        if len(self._seconds[path]) == WARM_UP_STEPS + TIMED_STEPS:
            return False
        if path != "dense" or any(map(self._needs_timing, self._fast())):
            return True
        fastest = min(map(self._fastest, self._fast()))
        return fastest > self._dense_lower_bound()

    def _dense_lower_bound(self) -> float:
        """Seconds that the products of a dense step take; 0 if not known."""
        one = None if self._sizes is None else product.seconds(*self._sizes)
        return 0.0 if one is None else DENSE_PRODUCTS * one

    def _fastest(self, path: StepPath) -> float:
        return min(self._seconds[path][WARM_UP_STEPS:])

    def _density_changed(self, density: float) -> bool:
        if self._decided_density is None:
            return False
        return not 1 / RETRY_FACTOR < density / self._decided_density < RETRY_FACTOR

    def _decide(self, density: float) -> None:
        fastest: dict[StepPath, float] = {
            path: self._fastest(path) for path in _ALL if self._seconds[path]
        }
        self.current = min(fastest, key=lambda path: fastest[path])
        self._decided_density = max(density, 1e-12)
        times = [f"{path} {1e3 * seconds:.1f} ms" for path, seconds in fastest.items()]
        if "dense" not in fastest:
            bound = 1e3 * self._dense_lower_bound()
            times.append(f"dense not tried: its products alone take {bound:.1f} ms")
        library = None if self._sizes is None else product.backend(self._sizes[1])
        if library is not None:
            times.append(f"encoder product by {library}")
        logger.info(
            "step path: %s at %.3g %% density (%s)", self.current, 100 * density, ", ".join(times)
        )
