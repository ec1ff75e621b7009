"""The time and peak memory of a training step, of this package and of the trainers it replaces.

    python -m benchmarks.speed            all measurements; first prints an estimate in minutes
    python -m benchmarks.speed --quick    small shapes, to check that it runs
    python -m benchmarks.report           the documents' tables and figure, from the records

At each shape, all trainers take turns in one process, on the same activations. Each record is a
line of JSON with the provenance that is needed to repeat it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.measure import WARM_UP, one_product, peak_memory, time_interleaved, warmed_up
from benchmarks.tables import terminal
from benchmarks.trainers import (
    AUTO,
    DEFAULT_CONFIG,
    SCREENED,
    SPARSE,
    STOCK,
    TRAINERS,
    Shape,
    missing_trainers,
)
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.step import product

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
PRODUCT = "one product"

SHAPES = (Shape(768, 12288, 2048, 70), Shape(2304, 16384, 4096, 70))
WIDTHS = tuple(Shape(768, d_sae, 2048, 70) for d_sae in (4096, 16384, 65536))
L0S = tuple(Shape(768, 12288, 2048, l0) for l0 in (10, 100, 1000, 3072))
IN_SWEEPS = (SPARSE, SCREENED, AUTO, STOCK)
# Dense trainers take over ten seconds a step at the large shape, on two cores.
AT_THE_LARGE_SHAPE = (SPARSE, SCREENED, AUTO, DEFAULT_CONFIG, STOCK, "SAELens batchtopk")
# Rough time of a step in units of one product, for the estimate.
ROUGH_COST = dict.fromkeys(TRAINERS, 15.0) | {
    SPARSE: 1.9,
    SCREENED: 1.5,
    AUTO: 1.5,
    DEFAULT_CONFIG: 2.5,
}

console = terminal()


@dataclass(frozen=True)
class Plan:
    """The shapes and trainers of one sweep, its rounds, and whether it measures memory."""

    sweep: str
    shapes: Sequence[Shape]
    trainers: Sequence[str]
    rounds: int
    memory: bool


def plans(quick: bool) -> list[Plan]:
    installed = [name for name in TRAINERS if name not in missing_trainers()]
    if quick:
        small = Shape(96, 1024, 512, 20)
        widths = [Shape(96, d_sae, 512, 20) for d_sae in (512, 2048)]
        l0s = [Shape(96, 1024, 512, l0) for l0 in (10, 256)]
        return [
            Plan("shapes", [small], installed, 3, True),
            Plan("d_sae", widths, IN_SWEEPS, 3, False),
            Plan("l0", l0s, IN_SWEEPS, 3, False),
        ]
    return [
        Plan("shapes", SHAPES[:1], installed, 5, True),
        Plan("shapes", SHAPES[1:], AT_THE_LARGE_SHAPE, 3, True),
        Plan("d_sae", WIDTHS, IN_SWEEPS, 3, False),
        Plan("l0", L0S, IN_SWEEPS, 3, False),
    ]


def only_trainers(work: Sequence[Plan], only: Sequence[str]) -> list[Plan]:
    """The plans of the shapes, with the named trainers and stock."""
    return [
        replace(plan, trainers=[name for name in plan.trainers if name in (STOCK, *only)])
        for plan in work
        if plan.sweep == "shapes"
    ]


def measure(plan: Plan, shape: Shape) -> Iterator[dict[str, Any]]:
    """Yield one record for the product and one for each trainer."""
    functions = {PRODUCT: one_product(shape)}
    trainers = {}
    for name in plan.trainers:
        trainers[name] = warmed_up(name, shape)
        functions[name] = trainers[name].step
    steps = time_interleaved(functions, plan.rounds)
    passes = time_interleaved({name: t.forward_backward for name, t in trainers.items()}, 2)
    l0s = {name: trainer.l0() for name, trainer in trainers.items()}
    library = product.backend(shape.d_in)
    limit = statistics.median(steps[PRODUCT])
    del functions, trainers
    gc.collect()
    for name, seconds in steps.items():
        median = statistics.median(seconds)
        record: dict[str, Any] = {
            "sweep": plan.sweep,
            "trainer": name,
            **asdict(shape),
            "seconds": seconds,
            "median_seconds": median,
            "tokens_per_second": shape.batch / median,
            "share_of_one_product": limit / median,
            "product_library": library,
        }
        if name != PRODUCT:
            record["measured_l0"] = l0s[name]
            record["forward_backward_seconds"] = min(passes[name])
            record["product_share_of_passes"] = min(steps[PRODUCT]) / min(passes[name])
            record["memory"] = peak_memory(name, shape) if plan.memory else None
        yield record


def shape_table(records: Sequence[dict[str, Any]], shape: Shape) -> Table:
    """The records of one shape as a table for the terminal."""
    title = f"d_in {shape.d_in}, d_sae {shape.d_sae}, batch {shape.batch}, L0 {shape.l0:g}"
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("s/step", "× stock", "tokens/s", "one product", "fwd+bwd s", "peak MB", "L0"):
        table.add_column(column, justify="right")
    stock = next(r["median_seconds"] for r in records if r["trainer"] == STOCK)
    for record in records:
        passes, memory = record.get("forward_backward_seconds"), record.get("memory")
        l0 = record.get("measured_l0")
        table.add_row(
            record["trainer"],
            f"{record['median_seconds']:.3f}",
            f"{stock / record['median_seconds']:.2f}",
            f"{record['tokens_per_second']:.0f}",
            f"{record['share_of_one_product']:.0%}",
            "" if passes is None else f"{passes:.3f}",
            ""
            if memory is None
            else f"{(memory['peak_bytes'] - memory['before_bytes']) / 1e6:.0f}",
            "" if l0 is None else f"{l0:.0f}",
        )
    return table


def megabytes(memory: dict[str, int]) -> float:
    """Peak memory beyond that before the first step, which holds the parameters."""
    return (memory["peak_bytes"] - memory["before_bytes"]) / 1e6


def estimated_minutes(work: Sequence[Plan]) -> float:
    """The benchmark's minutes, estimated from the speed of one product on this machine."""
    probe = Shape(768, 4096, 1024, 70)
    probe_seconds = min(time_interleaved({PRODUCT: one_product(probe)}, 5)[PRODUCT])
    per_flop = probe_seconds / (probe.d_in * probe.d_sae * probe.batch)
    seconds = 0.0
    for plan in work:
        for shape in plan.shapes:
            one = per_flop * shape.d_in * shape.d_sae * shape.batch
            for name in plan.trainers:
                steps = WARM_UP[name] + plan.rounds + 2
                if plan.memory:
                    steps += max(2, WARM_UP[name])
                    seconds += 6  # start of a process
                seconds += steps * ROUGH_COST[name] * one
    return seconds / 60


def main(
    quick: Annotated[bool, typer.Option(help="Small shapes, to check that it runs.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Records; an existing file is replaced.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="PyTorch threads.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these and stock, at two shapes.")
    ] = None,
) -> None:
    """Time every trainer and print the tables; records go to benchmarks/results."""
    if threads is not None:
        torch.set_num_threads(threads)
    if output is None:
        output = RESULTS.with_name("speed_quick.jsonl") if quick else RESULTS
    work = plans(quick) if only is None else only_trainers(plans(quick), only)
    for name, reason in missing_trainers().items():
        console.print(f"left out: {name} ({reason})")
    console.print(
        f"about {estimated_minutes(work):.0f} minutes on {torch.get_num_threads()} threads"
    )
    origin = provenance(seed=0)
    partial = output.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    for plan in work:
        for shape in plan.shapes:
            records = []
            for record in measure(plan, shape):
                records.append(record)
                append_jsonl(partial, {**record, "provenance": origin})
            console.print(shape_table(records, shape))
    partial.replace(output)
    console.print(f"records: {output}")


if __name__ == "__main__":
    typer.run(main)
