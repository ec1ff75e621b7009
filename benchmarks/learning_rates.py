"""What a learning rate costs: FVU over a grid of rates, on tuning sites and made data.

    python -m benchmarks.learning_rates                       # the embedded model and made data
    python -m benchmarks.learning_rates --model smollm2-135m

The recipe `default` with its schedule, in runs that differ in length, batch, L0 and width. The rule
(`jumprelu_plugin/control/learning_rate.py`) was fitted to these runs; docs/results.md has it on
other sites, and on a model that it was not fitted to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.architectures import ARCHITECTURES, PLUGIN, PLUGIN_RECIPE
from benchmarks.hostile_data import BY_NAME, HostileSet, Source
from benchmarks.language_model import HELD_OUT_SEQUENCES, metrics_on
from benchmarks.models import MODELS, SMOLLM2
from benchmarks.quality import Record, RecordFile, as_saved
from benchmarks.tables import RESULTS, Records, commits, read, table, terminal
from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import provenance
from jumprelu_plugin.studies.sweep import training
from jumprelu_plugin.studies.sweep.training import batches, trainer_config

OUTPUT = RESULTS / "learning_rates.jsonl"
MADE = "made data"
HELD_OUT_MADE = 20_000
RUN = ("model", "site", "d_in", "d_sae", "target_l0", "batch", "steps")


@dataclass(frozen=True)
class Run:
    """A run, and the rates it is tried with.

    Attributes:
        model: a name of `MODELS`, or `MADE`.
        site: the hook; of made data their width.
    """

    model: str
    site: str
    d_sae: int
    target_l0: int
    batch: int
    steps: int
    rates: tuple[float, ...]


_R3 = "blocks.3.hook_resid_post"
RUNS = (
    Run(EMBEDDED_MODEL, _R3, 2048, 40, 1024, 300, (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    Run(EMBEDDED_MODEL, _R3, 2048, 40, 1024, 1000, (4e-3, 8e-3, 1.6e-2)),
    Run(EMBEDDED_MODEL, _R3, 2048, 40, 1024, 4000, (1e-3, 2e-3, 4e-3, 8e-3)),
    Run(EMBEDDED_MODEL, _R3, 2048, 40, 256, 1000, (2e-3, 4e-3, 8e-3)),
    Run(EMBEDDED_MODEL, _R3, 2048, 40, 256, 4000, (1e-3, 2e-3, 4e-3, 8e-3)),
    Run(EMBEDDED_MODEL, _R3, 2048, 10, 1024, 1000, (2e-3, 4e-3, 8e-3, 1.6e-2)),
    Run(EMBEDDED_MODEL, _R3, 512, 16, 1024, 400, (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)),
    Run(EMBEDDED_MODEL, _R3, 512, 16, 1024, 1600, (3e-3, 6e-3, 1.2e-2, 2.4e-2)),
    Run(SMOLLM2, "blocks.18.hook_resid_post", 2304, 40, 1024, 300, (4e-3, 8e-3, 1.6e-2)),
    Run(SMOLLM2, "blocks.18.hook_resid_post", 2304, 40, 1024, 1000, (3e-3, 6e-3, 1.2e-2)),
    Run(SMOLLM2, "blocks.6.hook_resid_post", 2304, 40, 1024, 1000, (3e-3, 6e-3, 1.2e-2)),
    Run(SMOLLM2, "blocks.6.hook_mlp_out", 2304, 40, 1024, 1000, (3e-3, 6e-3, 1.2e-2)),
    Run(SMOLLM2, "blocks.18.attn.hook_z", 2304, 40, 1024, 1000, (3e-3, 6e-3, 1.2e-2)),
    Run(MADE, "128", 1024, 12, 256, 500, (4e-3, 8e-3, 1.6e-2)),
    Run(MADE, "128", 1024, 12, 256, 2000, (2e-3, 4e-3, 8e-3, 1.6e-2)),
    Run(MADE, "128", 1024, 12, 256, 8000, (1e-3, 2e-3, 4e-3, 8e-3)),
    Run(MADE, "128", 1024, 12, 256, 32000, (5e-4, 1e-3, 2e-3, 4e-3)),
    Run(MADE, "256", 509, 16, 512, 500, (4.4e-3, 8.8e-3, 1.75e-2)),
    Run(MADE, "512", 509, 16, 512, 500, (4.4e-3, 8.8e-3, 1.75e-2)),
)


def made_batches(hostile: HostileSet, batch: int) -> Iterator[Tensor]:
    """Endless batches of made data, each row new."""
    source = Source(hostile, 0)
    while True:
        yield source.draw(batch)


def measure(run: Run, rate: float, rows: Tensor | HostileSet, held_out: Tensor) -> Record:
    """Train with a rate, and judge on held-out activations."""
    made = isinstance(rows, HostileSet)
    source = made_batches(rows, run.batch) if made else batches(rows, run.batch, seed=0)
    torch.manual_seed(0)
    architecture = PLUGIN if made else PLUGIN_RECIPE
    sae = ARCHITECTURES[architecture](held_out.shape[1], run.d_sae, run.target_l0)
    decay = DEFAULT.lr_decay_fraction
    training.train(sae, source, trainer_config(run.steps, run.batch, rate, decay=decay))
    return metrics_on(as_saved(sae), held_out)


def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)} or {MADE!r}.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder that keeps activations.")] = Path(
        "output/learning_rates"
    ),
    output: Annotated[Path, typer.Option(help="Records, one line of JSON a training.")] = OUTPUT,
) -> None:
    """Train every run with each of its rates; what is recorded is not trained again."""
    file = RecordFile(output)
    for run in RUNS:
        if run.model not in (model or (EMBEDDED_MODEL, MADE)):
            continue
        if run.model == MADE:
            rows: Tensor | HostileSet = HostileSet("plain", int(run.site), BY_NAME["plain"].change)
            held_out = Source(rows, 99).draw(HELD_OUT_MADE)
        else:
            chosen = MODELS[run.model]
            sites = tuple(dict.fromkeys(r.site for r in RUNS if r.model == run.model))
            rows = chosen.cached(cache, sites, "train", chosen.sequences)[run.site]
            test = chosen.cached(cache, sites, "test", HELD_OUT_SEQUENCES)
            held_out = test[run.site].float()
        for rate in run.rates:
            case = {**asdict(run), "d_in": held_out.shape[1], "lr": rate, "seed": 0}
            del case["rates"]
            measured = functools.partial(measure, run, rate, rows, held_out)
            file.record(case, measured, provenance(seed=0))
    terminal().print(costs(output))


def costs(path: Path = OUTPUT) -> str:
    """Of every run: its rates with their FVU, the rule's rate, and what the rule costs."""
    groups: dict[tuple[Any, ...], Records] = {}
    trained = read(path)
    for record in trained:
        groups.setdefault(tuple(record[name] for name in RUN), []).append(record)
    rows = []
    for run, records in groups.items():
        found = {record["lr"]: record["fvu"] for record in sorted(records, key=lambda r: r["lr"])}
        named = dict(zip(RUN, run, strict=True))
        size = [named[name] for name in ("d_in", "d_sae", "target_l0", "batch", "steps")]
        rule = learning_rate(*size)
        lowest = min(found.values())
        tried = ", ".join(
            f"{rate:g}: {'**' if fvu == lowest else ''}{fvu:.4f}{'**' if fvu == lowest else ''}"
            for rate, fvu in found.items()
        )
        site = f"`{named['site'].removeprefix('blocks.')}`" if named["model"] != MADE else ""
        firings = named["batch"] * named["target_l0"] / named["d_sae"]
        sizes = [f"{value:,}" for value in size]
        rows.append(
            (
                f"{named['model']} {site}".strip(),
                *sizes,
                f"{firings:.3g}",
                tried,
                f"{rule:g}",
                f"{cost(found, rule):.1%}",
            )
        )
    header = ("", "d_in", "latents", "L0", "batch", "steps", "firings", "lr: FVU", "rule", "cost")
    return f"{table(header, rows)}\n\n{commits(trained).capitalize()}."


def cost(found: dict[float, float], rate: float) -> float:
    """Relative FVU above the best, both by parabolas of log FVU over log rate.

    Args:
        found: FVU of at least three rates.
        rate: another one, between them.
    """
    rates = sorted(found)
    grid = [rates[0] * (rates[-1] / rates[0]) ** (i / 200) for i in range(201)]
    lowest = min(_between(found, other) for other in (*grid, rate))
    return math.exp(_between(found, rate) - lowest) - 1


def _between(found: dict[float, float], rate: float) -> float:
    """Log FVU on the parabola through the three nearest rates (Lagrange)."""
    rates, at = sorted(found), math.log(rate)
    middle = min(range(1, len(rates) - 1), key=lambda i: abs(math.log(rates[i]) - at))
    xs = [math.log(r) for r in rates[middle - 1 : middle + 2]]
    ys = [math.log(found[r]) for r in rates[middle - 1 : middle + 2]]
    total = 0.0
    for i in range(3):
        others = [xs[j] for j in range(3) if j != i]
        total += ys[i] * math.prod((at - x) / (xs[i] - x) for x in others)
    return total


if __name__ == "__main__":
    typer.run(main)
