"""sae-probes on every SAE of a sweep: does the order of the architectures hold for probing?

    python -m benchmarks.probe_sweep SWEEP [SWEEP ...] [--hook HOOK] [--l0 L0]

Takes folders of `jumprelu sweep`, probes the SAEs of one hook at one target L0 on the data sets of
benchmarks/interop.py, and appends one record an SAE. A record that is there is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from sae_lens import SAE

from benchmarks.interop import DATASETS
from benchmarks.paper_tables import AT_RULE
from benchmarks.tables import RESULTS, Records, commits, read, table, terminal
from jumprelu_plugin import load_model
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.studies.figures.groups import architectures

PROBES = RESULTS / "probe_sweep.jsonl"
KS = (1, 2, 5, 16)
KEY = ("model", "site", "architecture", "target_l0", "seed", "lr", "lr_by_width")
console = terminal()


def aucs(sae: Any, record: dict[str, Any], cache: Path) -> dict[str, dict[int, float]]:
    """Test AUC of each data set's probes with k latents."""
    from sae_probes import run_sae_evals

    found = {}
    with (
        tempfile.TemporaryDirectory() as results,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # scikit-learn warns at each fit of a deprecated argument
        run_sae_evals(
            sae,
            model_name=record["model"],
            hook_name=record["site"],
            reg_type="l1",
            setting="normal",
            ks=list(KS),
            datasets=list(DATASETS),
            results_path=results,
            model_cache_path=cache,
            device="cpu",
        )
        for dataset in DATASETS:
            (file,) = Path(results).rglob(f"{dataset}_*.json")
            probes = json.loads(file.read_text(encoding="utf-8"))
            found[dataset] = {probe["k"]: probe["test_auc"] for probe in probes}
    return found


def harvest(record: dict[str, Any], cache: Path) -> None:
    """The activations of all data sets' last tokens, written once."""
    from sae_probes.generate_model_activations import ensure_dataset_activations

    model = load_model(record["model"])
    ensure_dataset_activations(
        record["model"],
        list(DATASETS),
        [record["site"]],
        cache,
        device="cpu",
        max_seq_len=model.cfg.n_ctx,
        model=model,
    )


def baseline(record: dict[str, Any], cache: Path) -> dict[str, float]:
    """Test AUC of sae-probes' logistic regression on all activations."""
    from sae_probes import run_baseline_evals

    with tempfile.TemporaryDirectory() as results:
        run_baseline_evals(
            model_name=record["model"],
            hook_name=record["site"],
            setting="normal",
            method="logreg",
            datasets=list(DATASETS),
            results_path=results,
            model_cache_path=cache,
            device="cpu",
        )
        return {
            dataset: json.loads(file.read_text(encoding="utf-8"))[0]["test_auc"]
            for dataset in DATASETS
            for file in Path(results).rglob(f"{dataset}_*.json")
        }


def probe_sweep() -> str:
    """Mean test AUC of each architecture by the latents that a probe may use."""
    records = read(PROBES)
    probed = [
        {**r, "architecture": AT_RULE} if r["lr_by_width"] else r
        for r in records
        if "architecture" in r
    ]
    rows = []
    for name, group in architectures(probed).items():
        by_k = [[_mean_auc(r["auc"], str(k)) for r in group] for k in KS]
        cells = [f"{statistics.fmean(v):.3f} ({max(v) - min(v):.3f})" for v in by_k]
        rows.append((name, f"{statistics.fmean(r['l0'] for r in group):.1f}", *cells))
    (raw,) = [r for r in records if "architecture" not in r]
    everything = f"{statistics.fmean(raw['auc'].values()):.3f}"
    rows.append(("all activations", "", *([""] * (len(KS) - 1)), everything))
    header = ("", "L0", *(f"{k} latent{'s' * (k > 1)}" for k in KS))
    note = (
        f"{raw['model']} `{raw['site']}`; mean of {len(DATASETS)} data sets and two seeds, the "
        f"seeds' difference in brackets; {raw['tool']}; {commits(records)}."
    )
    return f"{table(header, rows)}\n\n{note}"


def _mean_auc(auc: dict[str, dict[str, float]], k: str) -> float:
    return statistics.fmean(by_k[k] for by_k in auc.values())


def main(
    sweeps: Annotated[list[Path], typer.Argument(help="Folders of `jumprelu sweep`.")],
    hook: Annotated[str, typer.Option(help="The hook.")] = "blocks.2.hook_resid_post",
    l0: Annotated[float, typer.Option(help="The target L0.")] = 16,
    output: Annotated[Path, typer.Option(help="Records; those that are there are kept.")] = PROBES,
) -> None:
    """Probe the chosen SAEs of all sweeps."""
    chosen: list[tuple[Path, dict[str, Any]]] = [
        (sweep / record["folder"], record)
        for sweep in sweeps
        for record in read(sweep / "records.jsonl")
        if record["site"] == hook and record["target_l0"] == l0
    ]
    if not chosen:
        raise typer.BadParameter(f"no SAE of {hook} with target L0 {l0:g} in {sweeps}")
    known: Records = read(output) if output.exists() else []
    done = {tuple(r[name] for name in KEY) for r in known if "architecture" in r}
    origin = {"tool": f"sae-probes {version('sae-probes')}", "provenance": provenance(seed=0)}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        first = chosen[0][1]
        harvest(first, cache)
        if all("architecture" in r for r in known):
            site = {"model": first["model"], "site": hook}
            append_jsonl(output, {**site, "auc": baseline(first, cache), **origin})
        for path, record in chosen:
            key = {name: record[name] for name in KEY}
            if tuple(key.values()) in done:
                continue
            sae = SAE.load_from_disk(path)
            sae.fold_W_dec_norm()
            measured = {name: record[name] for name in ("l0", "fvu", "delta_lm_loss")}
            append_jsonl(output, {**key, **measured, "auc": aucs(sae, record, cache), **origin})
            console.print(f"{record['architecture']}, seed {record['seed']}: done")


if __name__ == "__main__":
    typer.run(main)
