"""On a language model's activations: is the asked L0 met, and how well is the model rebuilt?

    python -m benchmarks.language_model targets     # ours at L0 10, 20, 40, 80, 160 on three sites
    python -m benchmarks.language_model compare     # against other architectures at one L0

The embedded Gemma 2. Activations of half a million tokens of the train split are harvested once and
every architecture sees the same ones, twice, through SAELens' own trainer at the same learning
rate; it is judged as saved, on held-out text. The default recipe was tuned on layer 3's residual
stream at L0 32, which neither command reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from benchmarks.quality import ARCHITECTURES, OURS, as_saved, table, train
from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.hooks import flat_heads
from jumprelu_plugin.models import EMBEDDED_MODEL, load_model, model_digest
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.text import corpus, tokenized_dataset

RESULTS = Path(__file__).parent / "results"
SITES = ("blocks.2.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.3.attn.hook_z")
TARGETS = (10, 20, 40, 80, 160)
D_SAE, BATCH, CONTEXT = 2048, 1024, 128
app = typer.Typer(add_completion=False, help=__doc__)
console = Console()


@torch.no_grad()
def harvest(
    model: Any, sites: tuple[str, ...], split: str, sequences: int
) -> dict[str, Float[Tensor, "tokens width"]]:
    """Activations at every site, special tokens left out, in half precision."""
    text = tokenized_dataset(model.tokenizer, CONTEXT, split, corpus())
    special = torch.tensor(model.tokenizer.all_special_ids)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for rows in order[:sequences].split(64):
        tokens = torch.tensor(text[rows.tolist()]["tokens"])
        kept = ~torch.isin(tokens, special)
        _, cache = model.run_with_cache(
            tokens, names_filter=list(sites), stop_at_layer=1 + max(map(_layer, sites))
        )
        for site in sites:
            found[site].append(flat_heads(cache[site])[kept].half())
    return {site: torch.cat(pieces) for site, pieces in found.items()}


def _layer(site: str) -> int:
    return int(site.split(".")[1])


@torch.no_grad()
def judge(sae: Any, held_out: Float[Tensor, "tokens width"]) -> dict[str, float]:
    metrics = StreamingMetrics()
    for x in held_out.float().split(4000):
        acts = sae.encode(x)
        metrics.update(x, sae.decode(acts), acts)
    found = metrics.compute()
    return {
        "fvu": found.fvu,
        "l0": found.l0,
        "dead_share": found.dead_share,
        "share_above_10_percent": found.share_above_10_percent,
    }


def run(
    name: str, sites: tuple[str, ...], cases: list[tuple[str, int, int]], steps: int
) -> list[dict[str, Any]]:
    """Train and judge every (architecture, L0, seed) at every site; record each as it is done."""
    model = load_model(EMBEDDED_MODEL)
    rows, held_out = harvest(model, sites, "train", 4_000), harvest(model, sites, "test", 300)
    origin = provenance(model_digest=model_digest(model))
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{name}.partial"
    partial.unlink(missing_ok=True)
    records = []
    for site in sites:
        for architecture, l0, seed in cases:
            torch.manual_seed(seed)
            sae = ARCHITECTURES[architecture](rows[site].shape[1], D_SAE, l0)
            settings = {"steps": steps, "batch": BATCH, "lr": DEFAULT.runner["lr"], "seed": seed}
            seconds = train(sae, rows[site], **settings)
            record = {"site": site, "architecture": architecture, "l0_asked": l0, **settings}
            record |= {"seconds": seconds, **judge(as_saved(sae), held_out[site])}
            record["off_by"] = abs(record["l0"] / l0 - 1)
            records.append(record)
            append_jsonl(partial, {**record, "provenance": origin})
    partial.replace(RESULTS / f"{name}.jsonl")
    return records


@app.command()
def targets(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    sites: Annotated[list[str] | None, typer.Option(help="Hooks.")] = None,
) -> None:
    """Ours, at five targets on three sites, with no setting that depends on the case."""
    chosen = tuple(sites or SITES)
    records = run("targets", chosen, [(OURS, l0, 0) for l0 in TARGETS], steps)
    metrics = ("l0", "off_by", "fvu", "dead_share", "share_above_10_percent")
    for site in chosen:
        at_site = [record for record in records if record["site"] == site]
        console.print(table(site, at_site, "l0_asked", metrics))


@app.command()
def compare(
    l0: Annotated[int, typer.Option(help="Active latents a token.")] = 40,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    sites: Annotated[list[str] | None, typer.Option(help="Hooks.")] = None,
) -> None:
    """Ours beside batchtopk and topk, the same tokens for all."""
    chosen = tuple(sites or SITES[:1])
    names = (OURS, "batchtopk", "topk")
    cases = [(name, l0, seed) for seed in range(seeds) for name in names]
    records = run("compare", chosen, cases, steps)
    metrics = ("l0", "fvu", "dead_share", "share_above_10_percent")
    for site in chosen:
        at_site = [record for record in records if record["site"] == site]
        console.print(table(site, at_site, "architecture", metrics))


if __name__ == "__main__":
    app()
