"""Shortens the spins of waiting OpenMP threads while another process needs their cores.

On a CPU each of PyTorch's operators runs on a team of threads, and a thread that has done its part
spins until the others have done theirs. libgomp, the OpenMP library of PyTorch's builds for Linux,
spins 300,000 times, some milliseconds, before it sleeps. Where every thread has a core, that is
best. Where another process has one of the cores, two threads of a team share the other, and the one
that waits spins away the time that the one with work needs.

libgomp spins 100 times instead while it has more threads than there are CPUs (its manual, under
GOMP_SPINCOUNT), but the threads of other processes do not count. So while threads of this process
wait for a CPU, a second team is kept, whose threads sleep: enough of them that libgomp has more
threads than CPUs. The team that computes stays as it is. Operators are divided among its threads as
before, and every result is the same to the bit, which a smaller team would not give.

Measured with two threads of a Xeon (Sapphire Rapids) at (d_in 256, d_sae 2048, batch 1024): 23,800
tokens/s undisturbed, 8,200 beside a process that keeps one core busy, and 17,600 with short spins
(`python -m benchmarks.under_load`). Undisturbed, short spins lose a seventh, so they are undone
when nobody waits.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# With one of these set, the spins are the user's.
USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
INTERVAL = 0.5  # seconds from one look to the next, at least
# Seconds in which the busiest thread had something to do, for a look to count.
WORK = 0.1
# Seconds that all threads together waited for a CPU, per second of such work. Two threads alone on
# two cores: at most 0.02. Beside a busy process: 0.68 to 0.80, and 0.45 to 0.62 with short spins.
# (Not per second by the clock: who pauses, for text or a checkpoint, waits for nothing meanwhile.)
BUSY, FREE = 0.25, 0.12


class Spins:
    """Makes the spins of this process's waiting threads short or long.

    Args:
        times: nanoseconds that each thread has run, and waited for a CPU, by its name.

    Attributes:
        short: whether they are short.
    """

    def __init__(self, times: Callable[[], dict[str, tuple[int, int]]]) -> None:
        self._read_times = times
        self._team: SleepingTeam | None = None
        self._looked = time.monotonic()
        self._times: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._logged = False

    @property
    def short(self) -> bool:
        return self._team is not None

    def adapt(self) -> None:
        """Make the spins short if threads of this process wait for a CPU, and long if none does.

        For the beginning of a step, or of a forward pass of a language model: most calls only read
        the clock. Does nothing with one thread, where a variable of `USER_SETTINGS` is set, with
        another OpenMP library than libgomp, or where the system does not say how long threads
        waited.
        """
        if time.monotonic() - self._looked < INTERVAL or torch.get_num_threads() == 1:
            return
        if libgomp() is None or any(name in os.environ for name in USER_SETTINGS):
            return
        if not self._lock.acquire(blocking=False):  # another thread is looking
            return
        try:
            self._look()
        finally:
            self._lock.release()

    def _look(self) -> None:
        self._looked = time.monotonic()
        known, times = self._times, self._read_times()
        if not known:
            self._times = times
            return
        work, waited = 0, 0
        for thread, (ran_now, waited_now) in times.items():
            ran_before, waited_before = known.get(thread, (0, 0))
            new = max(0, waited_now - waited_before)
            waited += new
            work = max(work, ran_now - ran_before + new)
        if work < WORK * 1e9:  # too little to tell by: let it add up
            return
        self._times = times
        share = waited / work
        if self._team is None and share > BUSY:
            self._team = SleepingTeam()
            if not self._logged:
                self._logged = True
                logger.info(
                    "another process needs this one's cores: threads that wait go to sleep while "
                    "it does"
                )
        elif self._team is not None and share < FREE:
            self._team.end()
            self._team = None


class SleepingTeam:
    """A team of libgomp's threads that sleep until its end, so many that spins are short."""

    def __init__(self) -> None:
        # libgomp counts the main thread and the helpers of every team: with the computing threads,
        # size - 1 helpers have to be more than there are CPUs.
        size = max(2, (os.cpu_count() or 1) + 2 - torch.get_num_threads())
        self._ended = threading.Event()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._keep, args=(size, started), name="sleeping-team", daemon=True
        )
        self._thread.start()
        started.wait()

    def _keep(self, size: int, started: threading.Event) -> None:
        library = libgomp()
        assert library is not None
        # A thread keeps the team of its last parallel region, here one that does next to nothing,
        # until the thread ends.
        nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
        library.GOMP_parallel(nothing, None, size, 0)
        started.set()
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def nanoseconds_run_and_waited() -> dict[str, tuple[int, int]]:
    """How long each thread of this process has run, and been ready to run and waited for a CPU.

    Empty where the system does not say: elsewhere than on Linux, or a kernel without it
    (CONFIG_SCHED_INFO, the first two numbers of schedstat).
    """
    found = {}
    try:
        for task in Path("/proc/self/task").iterdir():
            try:
                ran, waited = map(int, (task / "schedstat").read_text().split()[:2])
                found[task.name] = ran, waited
            except (OSError, ValueError):  # the thread has ended; or the kernel was built without
                continue
    except OSError:
        pass
    return found


@cache
def libgomp() -> ctypes.CDLL | None:
    """The library that PyTorch's threads are of, if it is libgomp."""
    try:
        # Both are loaded already. A look-up in the first finds what PyTorch's operators call.
        libraries = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", None
        ours, everything = (ctypes.CDLL(library and str(library)) for library in libraries)
    except (OSError, TypeError):
        return None
    # LLVM's and Intel's library has libgomp's functions too, and this one.
    if any(hasattr(library, "kmp_set_blocktime") for library in (ours, everything)):
        return None
    return ours if hasattr(ours, "GOMP_parallel") else None


SPINS = Spins(nanoseconds_run_and_waited)
adapt = SPINS.adapt
