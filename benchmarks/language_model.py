"""SAEs of a language model's activations: the L0 that is reached, FVU and delta LM loss.

    python -m benchmarks.language_model targets    # the plugin at L0 10 to 160, every site
    python -m benchmarks.language_model compare    # against other architectures at L0 20, 40, 80

The model is the embedded Gemma 2, or SmolLM2 with `--model smollm2-135m`, or Gemma 3 with `--model
gemma-3-270m`. Activations are harvested once. All architectures train on them in the same order,
with SAELens' trainer, and are saved and then evaluated on held-out text. Every architecture but
this package's, which does it itself, gets centered activations: their mean is subtracted before
and added to b_dec after. `benchmarks/models.py` says which sites are reported and on which the
default recipe and the learning rates were tuned.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from benchmarks.architectures import (
    ARCHITECTURES,
    BATCHTOPK,
    GATED,
    PLUGIN,
    PLUGIN_RECIPE,
    STOCK,
)
from benchmarks.models import GEMMA3, MODELS
from benchmarks.quality import Record, RecordFile, as_saved, table, train
from benchmarks.tables import terminal
from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.finetune.activations import evaluate_on_activations
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.models.text import Split
from jumprelu_plugin.records import provenance
from jumprelu_plugin.studies.sweep.architectures import centers_itself, lr_decay_fraction

RESULTS = Path(__file__).parent / "results"
TARGETS = (10, 20, 40, 80, 160)
COMPARED = (PLUGIN_RECIPE, BATCHTOPK, "topk", GATED, STOCK)
COMPARED_L0 = (20, 40, 80)
BATCH = 1024
# Of the baselines: the best of three on a tuning site. On layer 3 of the embedded model 3e-3 was
# best for `batchtopk`, and on layer 18 of SmolLM2 for `batchtopk` and `topk`
# (results/baseline_learning_rates.jsonl). On Gemma 3's layer 7 FVU of `batchtopk` was 0.0398,
# 0.0336 and 0.0342 at 1e-3, 2e-3 and 4e-3.
BASELINE_LEARNING_RATE = 3e-3
LEARNING_RATES = {(GEMMA3, BATCHTOPK): 2e-3, (GEMMA3, "topk"): 2e-3}
HELD_OUT_SEQUENCES, SPLICED_SEQUENCES = 320, 64
app = typer.Typer(add_completion=False, help=__doc__)
console = terminal()
Model = Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")]
Steps = Annotated[
    int | None, typer.Option(help="Training steps of 1,024 tokens; by default the model's.")
]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps the activations.")]
Sites = Annotated[list[str] | None, typer.Option(help="Hooks; by default the reported ones.")]
L0s = Annotated[list[int] | None, typer.Option(help="Target L0s.")]
Rates = Annotated[
    list[float] | None,
    typer.Option("--lr", help="Learning rates to try; the tuned or computed one if not given."),
]


def learning_rate_of(
    model: str, architecture: str, d_in: int, d_sae: int, l0: float, steps: int
) -> float:
    """The recipe's for the plugin, and the tuned one for a baseline."""
    if architecture in (PLUGIN, PLUGIN_RECIPE):
        return learning_rate(d_in, d_sae, l0, BATCH, steps)
    return LEARNING_RATES.get((model, architecture), BASELINE_LEARNING_RATE)


def metrics_on(sae: Any, held_out: Float[Tensor, "tokens width"]) -> Record:
    """The metrics that a record holds, on held-out activations."""
    metrics = evaluate_on_activations(sae, held_out)
    return {
        "fvu": metrics.fvu,
        "l0": metrics.l0,
        "dead_share": metrics.dead_share,
        "share_above_10_percent": metrics.share_above_10_percent,
    }


def run(
    output: Path,
    model: str,
    sites: tuple[str, ...],
    cases: list[tuple[str, int, int]],
    steps: int | None,
    *,
    splice: bool,
    cache: Path | None,
    d_sae: int | None = None,
    rates: list[float] | None = None,
) -> list[Record]:
    """The record of every (architecture, L0, seed) at every site; missing ones are measured.

    With `rates` there is one of each case for each learning rate.
    """
    chosen = MODELS[model]
    width, steps = d_sae or chosen.d_sae, steps or chosen.steps

    @functools.cache
    def harvested(split: Split, sequences: int) -> dict[str, Tensor]:
        return chosen.activations(sites, split, sequences)

    def activations(site: str, split: Split, sequences: int) -> Tensor:
        if cache is None:
            return harvested(split, sequences)[site]
        return chosen.cached(cache, sites, split, sequences)[site]

    def measure(site: str, architecture: str, l0: int, seed: int, lr: float) -> Record:
        rows = activations(site, "train", chosen.sequences)
        torch.manual_seed(seed)
        sae = ARCHITECTURES[architecture](rows.shape[1], width, l0)
        center = None if centers_itself(sae) else rows.float().mean(0)
        decay = lr_decay_fraction(sae)
        seconds = train(
            sae, rows, steps=steps, batch=BATCH, lr=lr, seed=seed, center=center, decay=decay
        )
        saved = as_saved(sae, center)
        record = {
            "seconds": seconds,
            **metrics_on(saved, activations(site, "test", HELD_OUT_SEQUENCES).float()),
        }
        record["relative_error"] = abs(record["l0"] / l0 - 1)
        if splice:
            record["delta_lm_loss"] = chosen.delta_loss(saved, site, SPLICED_SEQUENCES)
        return record

    file = RecordFile(output)
    records = []
    settings = {"d_sae": width, "steps": steps, "batch": BATCH}
    for site in sites:
        d_in = activations(site, "train", chosen.sequences).shape[1]
        for architecture, l0, seed in cases:
            for lr in rates or [learning_rate_of(model, architecture, d_in, width, l0, steps)]:
                case = {"model": model, "site": site, "architecture": architecture, "target_l0": l0}
                case |= {"seed": seed, **settings, "lr": lr}
                measured = functools.partial(measure, site, architecture, l0, seed, lr)
                records.append(file.record(case, measured, provenance(seed=seed)))
    return records


def show(records: list[Record], by: str, metrics: tuple[str, ...]) -> None:
    for site in dict.fromkeys(record["site"] for record in records):
        at_site = [record for record in records if record["site"] == site]
        console.print(table(f"{at_site[0]['model']} {site}", at_site, by, metrics))


@app.command()
def targets(
    model: Model = EMBEDDED_MODEL,
    l0: L0s = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents; the model's reported width.")] = None,
    steps: Steps = None,
    sites: Sites = None,
    cache: Cache = None,
    output: Annotated[Path, typer.Option(help="Records.")] = RESULTS / "targets.jsonl",
) -> None:
    """The plugin at five target L0s on every site, with the same settings in all cases."""
    chosen = tuple(sites or MODELS[model].sites)
    cases = [(PLUGIN_RECIPE, level, 0) for level in l0 or TARGETS]
    records = run(output, model, chosen, cases, steps, splice=False, cache=cache, d_sae=d_sae)
    show(
        records,
        "target_l0",
        ("l0", "relative_error", "fvu", "dead_share", "share_above_10_percent"),
    )


@app.command()
def compare(
    model: Model = EMBEDDED_MODEL,
    l0: L0s = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …")] = 3,
    steps: Steps = None,
    sites: Sites = None,
    cache: Cache = None,
    only: Annotated[list[str] | None, typer.Option(help="Architectures; all if not given.")] = None,
    lr: Rates = None,
    output: Annotated[Path, typer.Option(help="Records.")] = RESULTS / "compare.jsonl",
) -> None:
    """The plugin and SAELens' architectures at the same L0s, on the same tokens."""
    chosen = tuple(sites or MODELS[model].sites[:1])
    names = tuple(only or COMPARED)
    levels = tuple(l0 or COMPARED_L0)
    cases = [(name, level, seed) for seed in range(seeds) for level in levels for name in names]
    records = run(output, model, chosen, cases, steps, splice=True, cache=cache, rates=lr)
    metrics = ("l0", "fvu", "delta_lm_loss", "dead_share", "share_above_10_percent")
    for level in levels:
        show(
            [record for record in records if record["target_l0"] == level], "architecture", metrics
        )


if __name__ == "__main__":
    app()
