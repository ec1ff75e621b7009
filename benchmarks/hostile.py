"""The default config on data made to be hard, beside stock `batchtopk` at its best learning rate.

    python -m benchmarks.hostile

Nothing is set for one case. Batches are drawn anew at every step, so nothing is seen twice but
where that is the case's point. `batchtopk` gets centered data and the best of three learning rates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from benchmarks.architectures import ARCHITECTURES, BATCHTOPK, PLUGIN
from benchmarks.hostile_data import SETS, HostileSet, Source
from benchmarks.quality import Record, RecordFile, as_saved, table, trainer_config
from benchmarks.tables import terminal
from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.finetune.activations import evaluate_on_activations
from jumprelu_plugin.records import provenance
from jumprelu_plugin.training.trainer import JumpReLUTrainer

RESULTS = Path(__file__).parent / "results" / "hostile.jsonl"
D_SAE, L0, BATCH = 509, 16.0, 512
HELD_OUT = 20_000
BASELINE_LRS = (2e-3, 4e-3, 8e-3)
SHOWN = ("lr", "l0", "fvu", "dead_share", "share_above_10_percent")


def batches(
    hostile: HostileSet, steps: int, seed: int, center: Float[Tensor, " d_in"] | None
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """A training's batches, and then ones as at its end."""
    source, step = Source(hostile, seed), 0
    while True:
        rows = source.draw(BATCH, min(1.0, step / steps))
        yield rows if center is None else rows - center
        step += 1


def measure(
    hostile: HostileSet, architecture: str, lr: float, steps: int, seed: int, l0: float = L0
) -> Record:
    """Train on one set; the metrics are those on data as at the end of the run."""
    held_out = Source(hostile, 10_000 + seed).draw(HELD_OUT, 1.0)
    center = None if architecture == PLUGIN else held_out.mean(0)
    torch.manual_seed(seed)
    sae: Any = ARCHITECTURES[architecture](hostile.d_in, D_SAE, l0)
    trainer = JumpReLUTrainer(
        cfg=trainer_config(steps, BATCH, lr),
        sae=sae,
        data_provider=batches(hostile, steps, seed, center),
    )
    trainer.fit()
    metrics = evaluate_on_activations(as_saved(sae, center), held_out)
    alarms = [] if center is not None or trainer.monitor is None else list(trainer.monitor.raised)
    return {
        "fvu": metrics.fvu,
        "l0": metrics.l0,
        "dead_share": metrics.dead_share,
        "share_above_10_percent": metrics.share_above_10_percent,
        "alarms": alarms,
    }


def learning_rate_of(hostile: HostileSet, steps: int, l0: float = L0) -> float:
    """The recipe's rate on a set."""
    return learning_rate(hostile.d_in, D_SAE, l0, BATCH, steps)


def main(
    steps: Annotated[int, typer.Option(help="Training steps of 512 tokens.")] = 500,
    sets: Annotated[list[str] | None, typer.Option(help="Names of sets; all if not given.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Architectures; both if not given.")
    ] = None,
    l0: Annotated[float, typer.Option(help="Target L0.")] = L0,
    seed: Annotated[int, typer.Option(help="Seed of initialization and data.")] = 0,
    output: Annotated[Path, typer.Option(help="Records, one line of JSON a run.")] = RESULTS,
) -> None:
    """Train on every set, and print and record the metrics."""
    file, console = RecordFile(output), terminal()
    for hostile in SETS:
        if sets and hostile.name not in sets:
            continue
        records = []
        for architecture in only or (PLUGIN, BATCHTOPK):
            ours = architecture == PLUGIN
            for lr in (learning_rate_of(hostile, steps, l0),) if ours else BASELINE_LRS:
                case = {"set": hostile.name, "architecture": architecture, "lr": lr, "seed": seed}
                case |= {"d_in": hostile.d_in, "d_sae": D_SAE, "target_l0": l0, "steps": steps}
                run = functools.partial(measure, hostile, architecture, lr, steps, seed, l0)
                records.append(file.record(case, run, provenance(seed=seed)))
        for record in records:
            record["run"] = f"{record['architecture']}, lr {record['lr']:g}"
        console.print(table(hostile.name, records, "run", SHOWN))


if __name__ == "__main__":
    typer.run(main)
