"""An L0 sweep beside a training from scratch at each L0: the FVU of each, and what it takes.

    python -m benchmarks.l0_sweep

Layer 2's residual stream of the embedded Gemma 2, harvested as in `language_model.py`. One SAE is
trained at L0 40 and refitted to the other L0s in three ways, each point from the one before.
Another is trained from scratch at every L0. Both are evaluated on held-out text.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens import SAE

from benchmarks.architectures import ARCHITECTURES, PLUGIN_RECIPE
from benchmarks.language_model import BATCH, HELD_OUT_SEQUENCES, RESULTS, TARGETS, metrics_on
from benchmarks.quality import as_saved, table, train
from benchmarks.subjects import SUBJECTS
from benchmarks.tables import terminal
from jumprelu_plugin.finetune.refit import (
    TRAINED_PARAMETERS,
    RefitSettings,
    refit_to_each,
    shift_thresholds,
)
from jumprelu_plugin.formats.saelens import from_sae
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import append_jsonl, provenance

SUBJECT = SUBJECTS[EMBEDDED_MODEL]
SITE, OWN_L0 = "blocks.2.hook_resid_post", 40


def main(
    steps: Annotated[int, typer.Option(help="Training steps from scratch.")] = 1000,
    refit_steps: Annotated[int, typer.Option(help="Training steps of a refit.")] = 200,
    saes: Annotated[
        Path | None, typer.Option(help="Folder that keeps what is trained from scratch.")
    ] = None,
) -> None:
    """Train, refit, evaluate; records go to benchmarks/results/l0_sweep.jsonl."""
    rows = SUBJECT.activations((SITE,), "train", SUBJECT.sequences)[SITE]
    held_out = SUBJECT.activations((SITE,), "test", HELD_OUT_SEQUENCES)[SITE]
    origin = provenance(seed=0, model_digest=SUBJECT.digest)
    partial = RESULTS / "l0_sweep.partial"
    partial.unlink(missing_ok=True)
    records: list[dict[str, Any]] = []

    def record(how: str, l0: float, sae: Any, steps: int, seconds: float) -> None:
        found = {"site": SITE, "how": how, "target_l0": l0, "steps": steps, "batch": BATCH}
        found |= {"seconds": seconds, **metrics_on(sae, held_out)}
        found["relative_error"] = abs(found["l0"] / l0 - 1)
        records.append(found)
        append_jsonl(partial, {**found, "provenance": origin})

    saved: dict[float, Any] = {}
    for l0 in TARGETS:
        kept = None if saes is None else saes / f"scratch-{l0}"
        started = time.perf_counter()
        saved[l0] = from_scratch(rows, l0, steps, kept)
        record("from scratch", l0, saved[l0], steps, time.perf_counter() - started)
    dictionary = from_sae(saved[OWN_L0])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    others = [l0 for l0 in TARGETS if l0 != OWN_L0]
    for l0 in others:
        started = time.perf_counter()
        at = shift_thresholds(dictionary.parameters, l0, rows)
        seconds = time.perf_counter() - started
        record("one shift", l0, replace(dictionary, parameters=at).as_sae(), 0, seconds)
    for way in TRAINED_PARAMETERS:
        settings = RefitSettings(train=way, steps=refit_steps, batch_tokens=BATCH)
        started = time.perf_counter()
        for l0, at in refit_to_each(dictionary.parameters, others, rows, settings):
            seconds = time.perf_counter() - started
            sae = replace(dictionary, parameters=at).as_sae()
            record(f"refit {way}", l0, sae, refit_steps, seconds)
            started = time.perf_counter()
    partial.replace(RESULTS / "l0_sweep.jsonl")
    for l0 in others:
        at_l0 = [record for record in records if record["target_l0"] == l0]
        terminal().print(table(f"L0 {l0}", at_l0, "how", ("l0", "fvu", "dead_share", "seconds")))


def from_scratch(rows: torch.Tensor, l0: int, steps: int, kept: Path | None) -> Any:
    """A stock SAE trained to this L0, read from `kept` where it is there."""
    if kept is not None and (kept / "cfg.json").is_file():
        return SAE.load_from_disk(kept)
    torch.manual_seed(0)
    sae = ARCHITECTURES[PLUGIN_RECIPE](rows.shape[1], SUBJECT.d_sae, l0)
    train(sae, rows, steps=steps, batch=BATCH, lr=DEFAULT.runner["lr"], seed=0)
    saved = as_saved(sae)
    if kept is not None:
        saved.save_model(kept)
    return saved


if __name__ == "__main__":
    typer.run(main)
