"""Measures times, interleaved in one process, and peak memory, in a new process each."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.trainers import AUTO, DEFAULT_CONFIG, TRAINERS, Shape, TimedTrainer, activations
from jumprelu_plugin.step import product

# Steps that are not timed. After 13, `auto` has timed every path.
WARM_UP = dict.fromkeys(TRAINERS, 1) | dict.fromkeys((AUTO, DEFAULT_CONFIG), 13)


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Call all functions once in each round; return the seconds of each function's calls.

    A slow minute of the machine then affects all functions alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def warmed_up(name: str, shape: Shape) -> TimedTrainer:
    """The trainer after the steps that are not timed."""
    torch.manual_seed(0)
    trainer = TRAINERS[name](shape)
    for _ in range(WARM_UP[name]):
        trainer.step()
    return trainer


def one_product(shape: Shape) -> Callable[[], None]:
    """The product that every exact step needs: all pre-activations, in float32 and in tiles."""
    x = activations(shape)
    weight, bias = torch.randn(shape.d_sae, shape.d_in), torch.zeros(shape.d_sae)
    rows = min(shape.batch, max(256, 2**22 // shape.d_sae))
    out = x.new_empty(rows, shape.d_sae)

    def run() -> None:
        for start in range(0, shape.batch, rows):
            piece = x[start : start + rows]
            product.linear(piece, weight, bias, out[: len(piece)])

    run()
    return run


def peak_memory(name: str, shape: Shape) -> dict[str, int] | None:
    """Peak memory of at least two steps in a new process, in bytes; None if not on Linux."""
    if not Path("/proc/self/status").exists():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", name, json.dumps(asdict(shape))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _steps_and_memory(name: str, shape: Shape) -> dict[str, int]:
    # Steps at a small shape first, so that memory that libraries allocate once is not counted.
    small = TRAINERS[name](Shape(64, 256, 96, 8))
    for _ in range(2):
        small.step()
    del small
    torch.manual_seed(0)
    trainer = TRAINERS[name](shape)
    gc.collect()
    before = _status("VmRSS")
    # At least two steps, because Adam's moments are allocated at the end of the first.
    for _ in range(max(2, WARM_UP[name])):
        trainer.step()
    return {"peak_bytes": _status("VmHWM"), "before_bytes": before}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_steps_and_memory(sys.argv[1], Shape(**json.loads(sys.argv[2])))))
