"""How things are timed: interleaved, in one process; peak memory in a fresh process of its own."""

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

from benchmarks.contenders import AUTO, CONTENDERS, DEFAULT_CONFIG, Contender, Shape, activations
from jumprelu_plugin.step import product

# Steps that are not timed; 13 are enough for `auto` to have timed every path it tries.
WARM_UP = dict.fromkeys(CONTENDERS, 1) | dict.fromkeys((AUTO, DEFAULT_CONFIG), 13)


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round. A slow minute of the machine touches all of them."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            took[name].append(time.perf_counter() - started)
    return took


def ready(name: str, shape: Shape) -> Contender:
    """A contender that has taken the steps that are not timed."""
    torch.manual_seed(0)
    contender = CONTENDERS[name](shape)
    for _ in range(WARM_UP[name]):
        contender.step()
    return contender


def one_product(shape: Shape) -> Callable[[], None]:
    """The product that no exact step can do without: all pre-activations, float32, in tiles."""
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
    """Bytes at the peak of two steps, in a fresh process; None where the system does not tell."""
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
    # What the libraries take once they have run at all is nobody's step.
    small = CONTENDERS[name](Shape(64, 256, 96, 8))
    for _ in range(2):
        small.step()
    del small
    torch.manual_seed(0)
    contender = CONTENDERS[name](shape)
    gc.collect()
    before = _status("VmRSS")
    # Twice at least: Adam's moments come into being at the end of the first step.
    for _ in range(max(2, WARM_UP[name])):
        contender.step()
    return {"peak_bytes": _status("VmHWM"), "before_bytes": before}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(_steps_and_memory(sys.argv[1], Shape(**json.loads(sys.argv[2])))))
