"""Draw the documents' tables and figures of quality from the records, and nothing else.

    python -m benchmarks.quality_report

Every block between `<!-- results:NAME -->` and `<!-- /results -->` is replaced by what the records
say; the frontier and the reached L0s are drawn into docs/figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import (
    architectures,
    explanation_tables,
    interop,
    learning_rates,
    paper_tables,
    trainers,
)
from benchmarks.l0_sweep import TRAINED_L0 as SWEEP_TRAINED_L0
from benchmarks.tables import (
    FIGURES,
    RESULTS,
    ROOT,
    Records,
    commits,
    fill,
    mean,
    read,
    seconds,
    spread,
    table,
)

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "ablations.md",
    ROOT / "docs" / "guides" / "transcoders-and-clt.md",
    ROOT / "docs" / "guides" / "interpretability.md",
)
COMPARE, TARGETS, L0_SWEEP, SYNTHETIC, SPEED = (
    RESULTS / f"{name}.jsonl" for name in ("compare", "targets", "l0_sweep", "synthetic", "speed")
)
DURABILITY = RESULTS / "durability.jsonl"
SITES, HOSTILE = RESULTS / "sites.jsonl", RESULTS / "hostile.jsonl"
SPARSIFY = RESULTS / "transcoders_vs_sparsify.json"

# The row of the README, its architecture in the quality benchmark, its trainer in the speed one.
README_L0 = 40
README_ROWS = (
    ("SAELens `jumprelu`", architectures.STOCK, trainers.STOCK),
    ("SAELens `batchtopk`", architectures.BATCHTOPK, "SAELens batchtopk"),
    ("**jumprelu-plugin**", architectures.PLUGIN_RECIPE, trainers.DEFAULT_CONFIG),
)
TITLES = {
    "tiny-gemma-2": "embedded Gemma 2",
    "smollm2-135m": "SmolLM2-135M",
    "gemma-3-270m": "Gemma 3 270M",
}
LOOK = {  # color, marker
    architectures.PLUGIN_RECIPE: ("#d55e00", "o"),
    architectures.BATCHTOPK: ("#0072b2", "s"),
    "topk": ("#56b4e9", "^"),
    architectures.GATED: ("#009e73", "D"),
    architectures.STOCK: ("#555555", "v"),
}


def readme() -> str:
    """Quality and speed side by side, with what was measured on what, and at which commits."""
    quality = [r for r in read(COMPARE) if r["target_l0"] == README_L0]
    speed = [r for r in read(SPEED) if r["sweep"] == "shapes"]
    shape = {name: speed[0][name] for name in ("d_in", "d_sae", "batch", "l0")}
    rows, trained, timed = [], [], []
    for label, architecture, trainer in README_ROWS:
        runs = [r for r in quality if r["architecture"] == architecture]
        (step,) = (r for r in speed if r["trainer"] == trainer and shape.items() <= r.items())
        rows.append(
            (
                label,
                f"{mean(runs, 'l0'):.1f}",
                f"{mean(runs, 'fvu'):.4f}",
                f"{mean(runs, 'delta_lm_loss'):.3f}",
                f"{mean(runs, 'dead_share'):.1%}",
                seconds(step["median_seconds"]),
            )
        )
        trained += runs
        timed.append(step)
    header = ("", "L0", "FVU", "delta LM loss", "dead latents", "seconds a step")
    hardware = timed[0]["provenance"]["hardware"]
    return (
        f"{table(header, rows)}\n\n"
        f"{_setting(trained)}, target L0 {README_L0}; {commits(trained)}. Seconds a step: "
        f"d_in {shape['d_in']}, d_sae {shape['d_sae']:,}, batch {shape['batch']:,}, "
        f"L0 {shape['l0']:g}, {hardware['threads']} threads of {hardware['cpu']}; "
        f"{commits(timed)}."
    )


def compared() -> str:
    """Every architecture at each target L0, lowest FVU first."""
    records = read(COMPARE)
    rows = []
    for target in sorted({r["target_l0"] for r in records}):
        groups = by_architecture([r for r in records if r["target_l0"] == target])
        for name, group in sorted(groups.items(), key=lambda item: mean(item[1], "fvu")):
            rows.append(
                (
                    f"{target:g}",
                    name,
                    spread(group, "l0", 2),
                    spread(group, "fvu", 4),
                    spread(group, "delta_lm_loss", 3),
                    f"{mean(group, 'dead_share'):.1%}",
                    f"{mean(group, 'share_above_10_percent'):.2%}",
                )
            )
    header = ("target L0", "", "L0", "FVU", "delta LM loss", "dead", "dense")
    return f"{table(header, rows, names=2)}\n\n{_setting(records)}; {commits(records)}."


def sites() -> str:
    """Every architecture near the main L0 at each site of three models, lowest FVU first."""
    return _by_site([r for r in read(SITES) if _near_main_l0(r["target_l0"])])


def sites_at_other_l0() -> str:
    """The same at other L0s."""
    return _by_site([r for r in read(SITES) if not _near_main_l0(r["target_l0"])])


def _near_main_l0(target: float) -> bool:
    return abs(target / README_L0 - 1) < 0.1


def _by_site(records: Records) -> str:
    groups = _by(records, "model", "site", "target_l0", "architecture")
    targets = {key: README_L0 if _near_main_l0(key[2]) else key[2] for key in groups}
    order = sorted(groups, key=lambda key: (*key[:2], targets[key], mean(groups[key], "fvu")))
    rows = []
    for key in order:
        model, site, target, architecture = key
        group = groups[key]
        other = "" if target == targets[key] else f", target {target:g}"
        rows.append(
            (
                f"{TITLES[model]} `{site.removeprefix('blocks.')}`",
                f"{architecture}{other}",
                f"{group[0]['lr']:g}",
                str(len(group)),
                f"{mean(group, 'l0'):.2f}",
                spread(group, "fvu", 4) if len(group) > 1 else f"{mean(group, 'fvu'):.4f}",
                f"{mean(group, 'delta_lm_loss'):.3f}",
                f"{mean(group, 'dead_share'):.1%}",
                f"{mean(group, 'share_above_10_percent'):.2%}",
            )
        )
    header = ("site", "", "lr", "seeds", "L0", "FVU", "delta LM loss", "dead", "dense")
    return f"{table(header, rows, names=2)}\n\n{commits(records).capitalize()}."


def hostile() -> str:
    """The default config and `batchtopk` at its best learning rate on data made to be hard."""
    rows, records = [], read(HOSTILE)
    for (name,), group in _by(records, "set").items():
        (ours,) = (r for r in group if r["architecture"] == architectures.PLUGIN)
        others = [r for r in group if r["architecture"] == architectures.BATCHTOPK]
        # The target at which its L0 on the data is nearest to ours.
        nearest = min(others, key=lambda r: abs(r["l0"] - ours["l0"]))["target_l0"]
        others = [r for r in others if r["target_l0"] == nearest]
        best = min(others, key=lambda r: r["fvu"])
        other_target = f" (target {nearest:g})" if nearest != ours["target_l0"] else ""
        rows.append(
            (
                name,
                f"{ours['l0']:.2f}",
                f"{ours['fvu']:.4f}",
                f"{ours['dead_share']:.1%}",
                ", ".join(ours["alarms"]) or "–",
                f"{best['lr']:g}",
                f"{best['l0']:.2f}{other_target}",
                f"{best['fvu']:.4f}",
                f"{best['dead_share']:.1%}",
            )
        )
    header = ("", "L0", "FVU", "dead", "alarms", "`batchtopk`: lr", "L0", "FVU", "dead")
    return f"{table(header, rows)}\n\n{commits(records).capitalize()}."


def known_features() -> str:
    """Every architecture at each width, best F1 first."""
    records = read(SYNTHETIC)
    rows = []
    for d_sae in sorted({r["d_sae"] for r in records}):
        groups: dict[str, Records] = {}
        for r in records:
            if r["d_sae"] == d_sae:
                target = "" if r["target_l0"] == 8.0 else f", target {r['target_l0']:g}"
                groups.setdefault(r["architecture"] + target, []).append(r)
        for name, group in sorted(groups.items(), key=lambda item: -mean(item[1], "f1")):
            rows.append(
                (
                    f"{d_sae:,}",
                    name,
                    spread(group, "mcc", 3),
                    spread(group, "f1", 3),
                    spread(group, "explained_variance", 3),
                    spread(group, "l0", 2),
                    f"{mean(group, 'dead_share'):.1%}",
                )
            )
    header = ("latents", "", "MCC", "F1", "explained variance", "L0", "dead")
    return f"{table(header, rows, names=2)}\n\n{commits(records).capitalize()}."


def targets() -> str:
    """The L0 each site reached, and what came with it."""
    records = read(TARGETS)
    rows = [
        (
            f"{TITLES[r['model']]} `{r['site']}`",
            f"{r['d_sae']:,}",
            f"{r['target_l0']:g}",
            f"{r['l0']:.2f}",
            f"{r['relative_error']:.1%}",
            f"{r['fvu']:.3f}",
            f"{r['dead_share']:.1%}",
            f"{r['share_above_10_percent']:.2%}",
        )
        for r in sorted(records, key=lambda r: (r["d_sae"], r["model"], r["site"], r["target_l0"]))
    ]
    header = ("", "latents", "target L0", "L0", "relative error", "FVU", "dead", "dense")
    return f"{table(header, rows)}\n\n{commits(records).capitalize()}."


def l0_sweep() -> str:
    """FVU at each L0, a row for each way to get there, and the L0 where it is 1 % off or more."""
    records = [r for r in read(L0_SWEEP) if r["target_l0"] != SWEEP_TRAINED_L0]
    levels = sorted({r["target_l0"] for r in records})
    rows = []
    for method in dict.fromkeys(r["method"] for r in sorted(records, key=lambda r: r["steps"])):
        at = {r["target_l0"]: r for r in records if r["method"] == method}
        rows.append((method, str(at[levels[0]]["steps"]), *(_at_l0(at[level]) for level in levels)))
    shown = table(("", "steps", *(f"L0 {level:g}: FVU" for level in levels)), rows)
    return f"{shown}\n\n{commits(records).capitalize()}."


def against_sparsify() -> str:
    """Each layer's transcoder beside sparsify's."""
    record = json.loads(SPARSIFY.read_text(encoding="utf-8"))
    rows = []
    for layer, pair in enumerate(
        zip(record["jumprelu-plugin"]["layers"], record["sparsify"]["layers"], strict=True)
    ):
        cells = [(f"{r['fvu']:.3f}", f"{r['l0']:.1f}", f"{r['dead_share']:.1%}") for r in pair]
        rows.append((str(layer), *cells[0], *cells[1]))
    header = ("layer", "jumprelu-plugin: FVU", "L0", "dead", "sparsify: FVU", "L0", "dead")
    spliced = record["jumprelu-plugin"]["spliced"]
    clean, ablated = spliced["loss_clean"], spliced["loss_mean_ablated"]
    return (
        f"{table(header, rows)}\n\n"
        f"All of jumprelu-plugin's spliced in at once: a delta LM loss of "
        f"{spliced['loss_spliced'] - clean:.3f} nats on {clean:.3f}, where the MLPs' means cost "
        f"{ablated - clean:.2f}. {commits([record]).capitalize()}."
    )


def durability() -> str:
    """Trials of each kind, and how many ended as the uninterrupted run."""
    records = read(DURABILITY)
    rows = []
    for (test, run), group in _by([r for r in records if "equal" in r], "test", "run").items():
        kinds = _by(group, "process", "moment") if test == "kill" else {("", ""): group}
        for (process, moment), trials in kinds.items():
            label = {
                "kill": f"killed {WHEN.get(moment, '')}{', new processes' * (process == 'fresh')}",
                "damage": "newest checkpoint truncated or a bit of it flipped",
                "disk": "disk full, read-only, emptied",
            }[test]
            found = [r for r in trials if r.get("found")] if test == "damage" else None
            rows.append(
                (
                    f"`{run}`",
                    label,
                    str(len(trials)),
                    str(sum(r["equal"] for r in trials)),
                    "" if found is None else str(len(found)),
                )
            )
    header = ("", "", "trials", "same weights", "damage found")
    (cost,) = (r for r in records if r["test"] == "cost")
    return (
        f"{table(header, sorted(rows), names=2)}\n\n"
        f"{commits(records).capitalize()}. A checkpoint of {cost['d_in']:,} × {cost['d_sae']:,} "
        f"with its mixing buffer, {cost['bytes'] / 1e6:,.0f} MB, took {cost['seconds']:.2f} s by "
        f"the clock to write, {cost['share_at_one_a_minute']:.1%} of the time at one a minute, and "
        f"{cost['processor_seconds']:.2f} s of processor time, on two cores at a load of "
        f"{cost['load']:.1f}."
    )


WHEN = {"random": "at a random moment", "writing": "while writing a checkpoint"}
BLOCKS: dict[str, Callable[[], str]] = {
    "readme": readme,
    "compared": compared,
    "sites": sites,
    "sites_at_other_l0": sites_at_other_l0,
    "hostile": hostile,
    "known_features": known_features,
    "targets": targets,
    "l0_sweep": l0_sweep,
    "against_sparsify": against_sparsify,
    "durability": durability,
    "explanations_embedded": explanation_tables.EMBEDDED.table,
    "explanations_gemma": explanation_tables.GEMMA.table,
    "learning_rates": learning_rates.costs,
    "paper_delta": paper_tables.EMBEDDED.delta,
    "paper_fvu": paper_tables.EMBEDDED.fvu,
    "paper_latents": paper_tables.EMBEDDED.latents,
    "gemma_delta": paper_tables.GEMMA.delta,
    "gemma_fvu": paper_tables.GEMMA.fvu,
    "gemma_latents": paper_tables.GEMMA.latents,
    "saebench_core": interop.saebench_core,
    "sae_probes": interop.sae_probes,
}


def draw_frontier(path: Path) -> None:
    """FVU and delta LM loss against L0, a line for each architecture."""
    records = read(COMPARE)
    figure, axes = _axes(2)
    for axis, (metric, label) in zip(
        axes,
        {"fvu": "fraction of variance unexplained", "delta_lm_loss": "delta LM loss, nats"}.items(),
        strict=True,
    ):
        for name, (color, marker) in LOOK.items():
            runs = by_architecture(records)[name]
            levels = sorted({r["target_l0"] for r in runs})
            groups = [[r for r in runs if r["target_l0"] == level] for level in levels]
            axis.scatter(
                [r["l0"] for r in runs], [r[metric] for r in runs], color=color, s=9, alpha=0.5
            )
            axis.plot(
                [mean(group, "l0") for group in groups],
                [mean(group, metric) for group in groups],
                color=color,
                marker=marker,
                markersize=5,
                linewidth=2 if name == architectures.PLUGIN_RECIPE else 1,
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="L0, active latents a token", ylabel=label)
        axis.set_xticks([20, 40, 80], ["20", "40", "80"])
        _plain_ticks(axis, metric)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(_setting(records).replace("`", ""), fontsize=10)
    _save(figure, path)


def draw_targets(path: Path) -> None:
    """The relative error of the L0 that is reached, at every target and site."""
    figure, (axis,) = _axes(1)
    records = read(TARGETS)
    markers = dict(zip(dict.fromkeys(r["site"] for r in records), "osD^v", strict=False))
    for (model, site), group in _by(records, "model", "site").items():
        axis.plot(
            [r["target_l0"] for r in group],
            [100 * r["relative_error"] for r in group],
            linestyle="",
            marker=markers[site],
            color=LOOK[architectures.PLUGIN_RECIPE][0],
            alpha=0.8,
            label=f"jumprelu-plugin, {TITLES[model]} {site}",
        )
    stock = by_architecture(read(COMPARE))[architectures.STOCK]
    color, marker = LOOK[architectures.STOCK]
    axis.plot(
        [r["target_l0"] for r in stock],
        [100 * abs(r["l0"] / r["target_l0"] - 1) for r in stock],
        linestyle="",
        marker=marker,
        color=color,
        label=f"{architectures.STOCK}, {TITLES[stock[0]['model']]} {stock[0]['site']}",
    )
    axis.set(
        xscale="log", yscale="log", xlabel="target L0", ylabel="relative error of L0, %",
        ylim=(0.01, 100),
    )  # fmt: skip
    levels = sorted({r["target_l0"] for r in records})
    axis.set_xticks(levels, [f"{level:g}" for level in levels])
    axis.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axis.minorticks_off()
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    _save(figure, path)


FIGURE_OF: dict[str, Callable[[Path], None]] = {
    "frontier.png": draw_frontier,
    "target_l0.png": draw_targets,
    "paper_frontier.png": paper_tables.EMBEDDED.draw_frontier,
}


def by_architecture(records: Records) -> dict[str, Records]:
    """The records of each architecture."""
    return {name: group for (name,), group in _by(records, "architecture").items()}


def _by(records: Records, *names: str) -> dict[tuple[Any, ...], Records]:
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def _setting(records: Records) -> str:
    """What was trained on what; every record says the same."""
    shared = ("model", "site", "d_sae", "steps", "batch")
    ((model, site, d_sae, steps, batch),) = _by(records, *shared)
    seeds = len({r["seed"] for r in records})
    return (
        f"{TITLES[model]} `{site}`, {d_sae:,} latents, {steps:,} steps of {batch:,} tokens, "
        f"mean of {seeds} seeds"
    )


def _at_l0(record: Mapping[str, float]) -> str:
    off = f" (L0 {record['l0']:.1f})" if record["relative_error"] >= 0.01 else ""
    return f"{record['fvu']:.3f}{off}"


def _axes(columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(5 * columns if columns > 1 else 7, 4 if columns > 1 else 4.6),
        layout="constrained",
    )
    axes = axes if columns > 1 else [axes]
    for axis in axes:
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_ticks(axis: Any, metric: str) -> None:
    ticks = [0.02, 0.03, 0.04] if metric == "fvu" else [0.05, 0.1, 0.2, 0.3]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    documents: Annotated[list[Path] | None, typer.Argument(help="Documents; all.")] = None,
    figures: Annotated[Path, typer.Option(help="Folder of the figures.")] = FIGURES,
) -> None:
    """Fill the documents and draw the figures."""
    for document in documents or DOCUMENTS:
        filled = fill(document.read_text(encoding="utf-8"), "results", BLOCKS)
        document.write_text(filled, encoding="utf-8")
        print(f"{document} drawn from {RESULTS}")
    for name, draw in FIGURE_OF.items():
        draw(figures / name)


if __name__ == "__main__":
    typer.run(main)
