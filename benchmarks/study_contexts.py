"""How long an explanation study takes to prepare, before a language model is asked anything.

    python -m benchmarks.study_contexts SAE_FOLDER

Draws a thousand latents of an SAE and collects, for each, ten contexts to explain it from and nine
held-out ones to score on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.tables import RESULTS, terminal
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.studies.explain.latents import study_latents
from jumprelu_plugin.studies.explain.settings import ExplainSettings
from jumprelu_plugin.studies.sampling.saes import load_study_saes
from jumprelu_plugin.studies.sweep.measures import PeakMemory

console = terminal()


def main(
    folder: Annotated[Path, typer.Argument(help="folder of an SAE.")],
    latents: Annotated[int, typer.Option(help="Latents drawn.")] = 1000,
    sequences: Annotated[int, typer.Option(help="Sequences of text.")] = 512,
    output: Annotated[Path, typer.Option(help="Records.")] = RESULTS / "study_contexts.jsonl",
) -> None:
    """Collect the contexts once, and append a record."""
    settings = ExplainSettings(latents=latents, sequences=sequences)
    start = time.perf_counter()
    (sae,) = load_study_saes([folder])
    _, tokens = sae.saved.sequences(sequences)
    model, loaded = sae.saved.model, time.perf_counter()
    memory = PeakMemory("cpu")
    with memory.measured():
        found = study_latents("", str(folder), model, sae.saved.dictionary, tokens, settings)
    done = time.perf_counter()
    record = {
        "model": sae.saved.choice.model_name,
        "d_sae": sae.saved.dictionary.cfg.d_sae,
        "latents": len(found),
        "contexts": sum(len(each.shown) for each in found),
        "held_out_contexts": sum(len(each.held_out) for each in found),
        "tokens": tokens.numel(),
        "seconds_loading": loaded - start,
        "seconds": done - loaded,
        "peak_memory_bytes": memory.bytes,
        "provenance": provenance(settings.seed, model_digest(model)),
    }
    append_jsonl(output, record)
    console.print(record)


if __name__ == "__main__":
    typer.run(main)
