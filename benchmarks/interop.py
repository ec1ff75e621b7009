"""SAEBench's `core` and sae-probes on an SAE of this package, beside its own evaluation.

    python -m benchmarks.interop [--folder FOLDER]

Runs the examples that train an SAE (300 steps), evaluate it with SAEBench and probe it with
sae-probes, each in a process of its own, and appends a record for each tool. They need the tools
(docs/guides/evaluate-and-steer.md) and no network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.tables import RESULTS, ROOT, Records, commits, read, table, terminal
from jumprelu_plugin.records import append_jsonl, provenance, read_json

INTEROP = RESULTS / "interop.jsonl"
STEPS = 300
# Of sae-probes' 113 those with short texts, from several sources.
DATASETS = (
    "5_hist_fig_ismale",
    "96_spam_is",
    "105_click_bait",
    "114_nyc_borough_Manhattan",
    "125_world_country_Italy",
    "126_art_type_book",
    "129_arith_mc_A",
    "130_temp_cat_Frequency",
    "133_context_type_Causality",
    "154_athlete_sport_football",
)
# SAEBench's name, its group, and the field of `evaluate`; where both define the same.
SAME = (
    ("ce_loss_without_sae", "model_performance_preservation", "loss_clean"),
    ("ce_loss_with_sae", "model_performance_preservation", "loss_spliced"),
    ("l0", "sparsity", "l0"),
    ("cossim", "reconstruction_quality", "cosine"),
    ("frac_alive", "misc_metrics", "1 - dead_share"),
    ("freq_over_1_percent", "misc_metrics", "share_above_1_percent"),
    ("freq_over_10_percent", "misc_metrics", "share_above_10_percent"),
)
# And where it does not.
OTHER = (
    ("mse", "reconstruction_quality", "mse"),
    ("explained_variance", "reconstruction_quality", "1 - fvu"),
    ("ce_loss_score", "model_performance_preservation", "fraction_recovered"),
    ("ce_loss_with_ablation", "model_performance_preservation", "loss_zero_ablated"),
)
console = terminal()


def run_example(name: str, folder: Path, *arguments: str) -> None:
    """Run an example in `folder`; its output is shown.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {**os.environ, "JUMPRELU_EXAMPLE_STEPS": str(STEPS), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def core_record(output: Path) -> dict[str, Any]:
    """What SAEBench and `evaluate` wrote of the same tokens, side by side."""
    theirs = read_json(output / "saebench_core.json")
    ours = read_json(output / "evaluate.json")["result"]
    densities = [latent["feature_density"] for latent in theirs["eval_result_details"]]
    frequency = torch.tensor(ours.pop("firing_frequency"), dtype=torch.float64)
    gap = (torch.tensor(densities, dtype=torch.float64) - frequency).abs().max()
    return {
        "tool": f"sae-bench {version('sae-bench')}",
        "evaluation": "core",
        "steps": STEPS,
        "batch_size": theirs["eval_config"]["batch_size_prompts"],
        "saebench": theirs["eval_result_metrics"],
        "evaluate": ours,
        "largest_density_difference": float(gap),
    }


def probes_record(output: Path, model: str, hook: str) -> dict[str, Any]:
    """Test AUC and accuracy of each data set's probes, and of the one on all activations."""
    found = {}
    for dataset in DATASETS:
        probes = _results(output, "sae_probes", model, f"{dataset}_{hook}_l1.json")
        (baseline,) = _results(output, "baseline_results", model, f"{dataset}_{hook}_logreg.json")
        found[dataset] = {
            "latents": {probe["k"]: _scores(probe) for probe in probes},
            "activations": _scores(baseline),
        }
    return {
        "tool": f"sae-probes {version('sae-probes')}",
        "scikit_learn": version("scikit-learn"),
        "evaluation": "sparse probing, normal setting, l1",
        "steps": STEPS,
        "model_name": model,
        "hook": hook,
        "datasets": found,
    }


def _results(output: Path, kind: str, model: str, file: str) -> list[dict[str, Any]]:
    path = output / "results" / f"{kind}_{model}" / "normal_setting" / file
    return json.loads(path.read_text(encoding="utf-8"))


def _scores(result: dict[str, Any]) -> dict[str, float]:
    return {"auc": result["test_auc"], "accuracy": result["test_acc"]}


def saebench_core() -> str:
    """SAEBench's numbers beside this package's, with their relative difference."""
    record = _last("core")
    theirs, ours = record["saebench"], record["evaluate"]
    rows = []
    for pairs, same in ((SAME, True), (OTHER, False)):
        for name, group, own in pairs:
            value, field = theirs[group][name], own.removeprefix("1 - ")
            own_value = ours[field] if field == own else 1 - ours[field]
            relative = abs(value - own_value) / abs(own_value)
            difference = ("0", f"{relative:.0e}")[relative > 0] if same else "other"
            rows.append((f"`{name}`", f"`{own}`", f"{value:.6f}", f"{own_value:.6f}", difference))
    header = ("SAEBench `core`", "`evaluate`", "SAEBench", "jumprelu-plugin", "relative difference")
    note = (
        f"{record['tool']}; {ours['model_name']} `{ours['hook']}`, {ours['d_sae']:,} latents after "
        f"{record['steps']:,} steps; {ours['n_tokens']:,} tokens. The densities of a latent differ "
        f"by {record['largest_density_difference']:.0e} at most; {commits([record])}."
    )
    return f"{table(header, rows, names=2)}\n\n{note}"


def sae_probes() -> str:
    """Test AUC by the latents that a probe may use, and of all activations."""
    record = _last("sparse probing, normal setting, l1")
    found = record["datasets"]
    ks = list(next(iter(found.values()))["latents"])
    columns = {
        name: [*(each["latents"][k]["auc"] for k in ks), each["activations"]["auc"]]
        for name, each in found.items()
    }
    rows = [(f"`{name}`", *(f"{auc:.3f}" for auc in aucs)) for name, aucs in columns.items()]
    means = [sum(column) / len(rows) for column in zip(*columns.values(), strict=True)]
    rows.append(("mean", *(f"{auc:.3f}" for auc in means)))
    header = ("data set", *(f"{k} latent{'s' * (k != '1')}" for k in ks), "all activations")
    note = (
        f"{record['tool']}, scikit-learn {record['scikit_learn']}; {record['model_name']} "
        f"`{record['hook']}`; {commits([record])}."
    )
    return f"{table(header, rows)}\n\n{note}"


def _last(evaluation: str) -> dict[str, Any]:
    records: Records = [r for r in read(INTEROP) if r["evaluation"] == evaluation]
    return records[-1]


def main(
    folder: Annotated[
        Path | None, typer.Option(help="Where the examples run; an SAE there is not trained again.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Records.")] = INTEROP,
) -> None:
    """Train, evaluate with both tools, append two records."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "output" / "01_train" / "cfg.json").exists():
            run_example("01_train", place)
        origin = provenance(seed=0)
        run_example("20_saebench", place)
        core = core_record(place / "output" / "20_saebench")
        append_jsonl(output, {**core, "provenance": origin})
        run_example("21_sae_probes", place, *DATASETS)
        site = core["evaluate"]
        probes = probes_record(place / "output" / "21_sae_probes", site["model_name"], site["hook"])
        append_jsonl(output, {**probes, "provenance": origin})
    console.print(saebench_core() if output == INTEROP else f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
