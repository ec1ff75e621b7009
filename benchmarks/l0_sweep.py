"""An L0 sweep, compared with training from scratch at each L0: FVU and time.

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
from benchmarks.language_model import BATCH, HELD_OUT_SEQUENCES, RESULTS, metrics_on
from benchmarks.models import MODELS
from benchmarks.quality import as_saved, table, train
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

MODEL = MODELS[EMBEDDED_MODEL]
SITE, TRAINED_L0 = "blocks.2.hook_resid_post", 40
# With all thresholds at 0 the dictionary trained at 40 has 123 active latents: 160 is out of reach.
L0S = (10, 20, 40, 80)


def main(
    steps: Annotated[int, typer.Option(help="Training steps from scratch.")] = 1000,
    refit_steps: Annotated[int, typer.Option(help="Training steps of a refit.")] = 200,
    saes: Annotated[
        Path | None, typer.Option(help="Folder for the SAEs trained from scratch.")
    ] = None,
) -> None:
    """Train, refit, evaluate; records go to benchmarks/results/l0_sweep.jsonl."""
    rows = MODEL.activations((SITE,), "train", MODEL.sequences)[SITE]
    held_out = MODEL.activations((SITE,), "test", HELD_OUT_SEQUENCES)[SITE]
    origin = provenance(seed=0, model_digest=MODEL.digest)
    partial = RESULTS / "l0_sweep.partial"
    partial.unlink(missing_ok=True)
    records: list[dict[str, Any]] = []

    def add_record(method: str, l0: float, sae: Any, steps: int, seconds: float) -> None:
        record = {"site": SITE, "method": method, "target_l0": l0, "steps": steps, "batch": BATCH}
        record |= {"seconds": seconds, **metrics_on(sae, held_out)}
        record["relative_error"] = abs(record["l0"] / l0 - 1)
        records.append(record)
        append_jsonl(partial, {**record, "provenance": origin})

    saved: dict[float, Any] = {}
    for l0 in L0S:
        folder = None if saes is None else saes / f"scratch-{l0}"
        started = time.perf_counter()
        saved[l0] = from_scratch(rows, l0, steps, folder)
        add_record("from scratch", l0, saved[l0], steps, time.perf_counter() - started)
    dictionary = from_sae(saved[TRAINED_L0])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    others = [l0 for l0 in L0S if l0 != TRAINED_L0]
    for l0 in others:
        started = time.perf_counter()
        shifted = shift_thresholds(dictionary.parameters, l0, rows)
        seconds = time.perf_counter() - started
        add_record("one shift", l0, replace(dictionary, parameters=shifted).as_sae(), 0, seconds)
    for trained in TRAINED_PARAMETERS:
        settings = RefitSettings(train=trained, steps=refit_steps, batch_tokens=BATCH)
        started = time.perf_counter()
        for l0, refitted in refit_to_each(dictionary.parameters, others, rows, settings):
            seconds = time.perf_counter() - started
            sae = replace(dictionary, parameters=refitted).as_sae()
            add_record(f"refit {trained}", l0, sae, refit_steps, seconds)
            started = time.perf_counter()
    partial.replace(RESULTS / "l0_sweep.jsonl")
    for l0 in others:
        at_l0 = [record for record in records if record["target_l0"] == l0]
        terminal().print(table(f"L0 {l0}", at_l0, "method", ("l0", "fvu", "dead_share", "seconds")))


def from_scratch(rows: torch.Tensor, l0: int, steps: int, folder: Path | None) -> Any:
    """A stock SAE trained to this L0, read from `folder` if it exists."""
    if folder is not None and (folder / "cfg.json").is_file():
        return SAE.load_from_disk(folder)
    torch.manual_seed(0)
    sae = ARCHITECTURES[PLUGIN_RECIPE](rows.shape[1], MODEL.d_sae, l0)
    lr = DEFAULT.learning_rate(sae.cfg, steps * BATCH, BATCH)
    train(sae, rows, steps=steps, batch=BATCH, lr=lr, seed=0, decay=DEFAULT.lr_decay_fraction)
    saved = as_saved(sae)
    if folder is not None:
        saved.save_model(folder)
    return saved


if __name__ == "__main__":
    typer.run(main)
