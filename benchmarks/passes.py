"""The CPU time of each part of a forward and backward pass, at one shape.

    OMP_NUM_THREADS=1 python -m benchmarks.passes
    OMP_NUM_THREADS=1 python -m benchmarks.passes --path screened --rounds 9

Times are CPU seconds of this process, which hardly depend on what else the machine runs; with one
thread they equal the time on an idle machine. The minimum over rounds is shown. The time of a part
does not include parts inside it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.table import Table

from benchmarks.measure import one_product
from benchmarks.tables import terminal
from benchmarks.trainers import TRAINERS, Shape
from jumprelu_plugin.saes import losses
from jumprelu_plugin.step import product, select, sparse
from jumprelu_plugin.step.pattern import Pattern

# By part: the module or class in which the timed function is looked up, and its name.
PARTS: dict[str, tuple[Any, str]] = {
    "encode product, float32": (product, "linear"),
    "finding candidates, without that product": (select, "find_candidates"),
    "z and gradient of activations at the pairs": (Pattern, "sampled_product"),
    "decode": (Pattern, "times"),
    "gradients of W_dec and W_enc": (Pattern, "transposed_times"),
    "returning free memory": (sparse, "make_room"),
    "reconstruction loss, forward": (losses, "reconstruction"),
    "setting gradients to None": (torch.optim.Optimizer, "zero_grad"),
}
REST = "everything else"
ALONE = "one product, alone"


class Stopwatch:
    """CPU seconds of each part, without the parts inside it.

    Attributes:
        seconds: by part; "everything else" is the time in no other part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        self._inside.append(0.0)
        started = time.process_time()
        try:
            yield
        finally:
            seconds = time.process_time() - started
            self.seconds[part] += seconds - self._inside.pop()
            if self._inside:
                self._inside[-1] += seconds

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self.timing(part):
                return function(*arguments, **named)

        return call


def time_parts(passes: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of each part of one forward and backward pass; their sum is the whole."""
    watch = Stopwatch()
    with ExitStack() as patches:
        for part, (holder, name) in PARTS.items():
            function = watch.timed(part, getattr(holder, name))
            patches.enter_context(mock.patch.object(holder, name, function))
        with watch.timing(REST):
            passes()
    return watch.seconds


def measure(path: str, shape: Shape, rounds: int) -> dict[str, float]:
    """The minimum over rounds of the CPU seconds of each part, and of one product alone."""
    torch.manual_seed(0)
    trainer = TRAINERS[f"jumprelu-plugin, {path}"](shape)
    trainer.step()
    alone = one_product(shape)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        started = time.process_time()
        alone()
        times[ALONE].append(time.process_time() - started)
        for part, seconds in time_parts(trainer.forward_backward).items():
            times[part].append(seconds)
    return {part: min(seconds) for part, seconds in times.items()}


def main(
    path: Annotated[str, typer.Option(help="sparse or screened.")] = "sparse",
    d_in: Annotated[int, typer.Option()] = 2304,
    d_sae: Annotated[int, typer.Option()] = 16384,
    batch: Annotated[int, typer.Option()] = 4096,
    l0: Annotated[float, typer.Option(help="Mean number of active latents.")] = 70,
    rounds: Annotated[int, typer.Option(help="Rounds; the minimum is shown.")] = 7,
) -> None:
    """Print the parts of a forward and backward pass, largest first."""
    times = measure(path, Shape(d_in, d_sae, batch, l0), rounds)
    alone = times.pop(ALONE)
    whole = sum(times.values())
    title = f"{path}, d_in {d_in}, d_sae {d_sae}, batch {batch}, L0 {l0:g}"
    table = Table(title=f"{title}, {torch.get_num_threads()} threads")
    table.add_column("", no_wrap=True)
    table.add_column("CPU ms", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in sorted(times.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{1e3 * seconds:.0f}", f"{seconds / whole:.0%}")
    table.add_row("forward and backward", f"{1e3 * whole:.0f}", "100%", end_section=True)
    table.add_row(ALONE, f"{1e3 * alone:.0f}", f"{alone / whole:.0%}")
    terminal().print(table)


if __name__ == "__main__":
    typer.run(main)
