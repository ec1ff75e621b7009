"""What an int8 activation cache costs an SAE that is trained on it, and what it saves.

    python -m benchmarks.int8_cache            three seeds on each cache
    python -m benchmarks.int8_cache --quick    a few steps, to check that it runs

Both sweeps train the same SAEs (seeds, tokens, order of tokens) on activations of the embedded
Gemma 2, once cached in float32 and once in int8, and measure them in the model itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.tables import terminal
from jumprelu_plugin import SweepSettings, run_sweep
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.studies.sweep.record_file import read_records

RESULTS = Path(__file__).parent / "results" / "int8_cache.jsonl"
HOOKS = ("blocks.3.hook_resid_post",)
MEASURES = ("fvu", "delta_lm_loss", "l0")
console = terminal()


def settings(dtype: str, quick: bool) -> SweepSettings:
    """The sweep on a cache of this dtype."""
    return SweepSettings(
        architectures=("jumprelu-plugin",),
        l0=(20,),
        seeds=(0, 1, 2),
        hook_names=HOOKS,
        d_sae=128 if quick else 1024,
        training_tokens=5_000 if quick else 204_800,
        train_batch_size_tokens=256 if quick else 1024,
        cached_tokens=5_000 if quick else 100_000,
        held_out=4 if quick else 48,
        cache_dtype=dtype,
    )


def measured(dtype: str, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """One record for each hook: measures by seed, and the size of the cache's files on disk."""
    chosen = settings(dtype, quick)
    records, _ = read_records(run_sweep(folder, chosen, console=console))
    files = [file for file in (folder / "activations").rglob("*") if file.is_file()]
    found = []
    for hook in HOOKS:
        own = sorted((r for r in records if r["site"] == hook), key=lambda r: r["seed"])
        found.append(
            {
                "model": chosen.model_name,
                "hook": hook,
                "dtype": dtype,
                "d_sae": chosen.d_sae,
                "steps": chosen.steps,
                "seeds": [record["seed"] for record in own],
                **{name: [record[name] for record in own] for name in MEASURES},
                "cached_tokens": chosen.cached_tokens,
                "cache_bytes_of_all_hooks": sum(file.stat().st_size for file in files),
            }
        )
    return found


def main(
    quick: Annotated[bool, typer.Option(help="A few steps, to check that it runs.")] = False,
    output: Annotated[Path | None, typer.Option(help="Records; an existing file is kept.")] = None,
) -> None:
    """Train on both caches, compare, and write one record for each hook and dtype."""
    output = output or (RESULTS.with_stem("int8_cache_quick") if quick else RESULTS)
    origin = provenance(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            record
            for dtype in ("float32", "int8")
            for record in measured(dtype, Path(folder) / dtype, quick)
        ]
    for record in found:
        append_jsonl(output, {**record, "provenance": origin})
    for hook in HOOKS:
        exact, rounded = (
            next(r for r in found if r["hook"] == hook and r["dtype"] == dtype)
            for dtype in ("float32", "int8")
        )
        for name in MEASURES:
            spread = max(exact[name]) - min(exact[name])
            change = mean(rounded[name]) - mean(exact[name])
            console.print(
                f"{hook}, {name}: float32 {mean(exact[name]):.4f}, its seeds' spread {spread:.4f}; "
                f"int8 {change:+.4f}"
            )
    sizes = [record["cache_bytes_of_all_hooks"] for record in (found[-1], found[0])]
    console.print(f"bytes: {sizes[0]} of {sizes[1]}, {sizes[0] / sizes[1]:.4f}")


if __name__ == "__main__":
    typer.run(main)
