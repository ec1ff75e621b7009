"""How training went, and what it took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jumprelu_plugin.studies.figures.groups import (
    Record,
    Spread,
    architectures,
    at_target,
    middle_target,
    places,
    record_look,
    with_field,
)
from jumprelu_plugin.studies.figures.panel import Figure, Panel, plain_log_ticks
from jumprelu_plugin.studies.sweep.training import THRESHOLD_QUANTILES


def dynamics(records: Iterable[Record]) -> Figure | None:
    """L0, FVU, sparsity coefficient and thresholds by step, at the first site."""
    known = [record for record in records if record.get("dynamics")]
    if not known:
        return None
    place, here = next(iter(places(known).items()))
    target = middle_target(here)
    seed = min(record["seed"] for record in here)
    runs = {
        architecture: next((r for r in at_target(own, target) if r["seed"] == seed), None)
        for architecture, own in architectures(here).items()
    }
    shown = {name: run for name, run in runs.items() if run is not None}
    if not shown:
        return None
    panels = [
        Panel("L0 of the batch", lambda axes: _lines(axes, shown, "l0", log=True, target=target)),
        Panel("FVU of the batch", lambda axes: _lines(axes, shown, "fvu", log=True)),
        Panel(
            "sparsity coefficient",
            lambda axes: _lines(axes, shown, "coefficient", log=True),
        ),
    ]
    with_thresholds = {
        name: run for name, run in shown.items() if run["dynamics"][-1].get("threshold_quantiles")
    }
    panels += [
        Panel(f"thresholds, {name}", lambda axes, run=run: _thresholds(axes, run))
        for name, run in with_thresholds.items()
    ]
    return Figure(
        "training_dynamics",
        f"Training at {place}, target L0 {target:g}",
        "Samples of the first seed's training. Coefficients are in each architecture's own units, "
        "thresholds in those of its scaled activations; bands hold 50 % and 90 % of the latents.",
        panels,
    )


def _lines(
    axes: Any,
    runs: dict[str, Record],
    field: str,
    *,
    log: bool = False,
    target: float | None = None,
) -> None:
    for architecture, run in runs.items():
        points = [(s["step"], s[field]) for s in run["dynamics"] if s.get(field) is not None]
        if points:
            own_look = {name: record_look(run)[name] for name in ("color", "linestyle")}
            axes.plot(*zip(*points, strict=True), label=architecture, **own_look)
    if target is not None:
        axes.axhline(target, color="#888888", ls=":", lw=1)
    if log:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.set_xlabel("step")


def _thresholds(axes: Any, run: Record) -> None:
    steps = [sample["step"] for sample in run["dynamics"]]
    levels = list(zip(*(sample["threshold_quantiles"] for sample in run["dynamics"]), strict=True))
    shade = record_look(run)["color"]
    half = len(THRESHOLD_QUANTILES) // 2
    for i in range(half):
        axes.fill_between(steps, levels[i], levels[-1 - i], color=shade, alpha=0.22, lw=0)
    axes.plot(steps, levels[half], color=shade)
    axes.set_xlabel("step")


def cost(records: Iterable[Record]) -> Figure | None:
    """Seconds a step and peak memory of each architecture, over all sites, L0s and seeds."""
    known = [record for record in with_field(records, "seconds") if record.get("steps")]
    if not known:
        return None
    panels = [Panel("time", lambda axes: _bars(axes, known, _milliseconds, "ms a step"))]
    measured = with_field(known, "peak_memory_bytes")
    if measured:
        panels.append(
            Panel("memory", lambda axes: _bars(axes, measured, _megabytes, "peak MB in training"))
        )
    return Figure(
        "time_and_memory",
        "Time and memory of a training",
        "Means over sites, L0s and seeds; bars from the least to the greatest. Times are of the "
        "machine that trained, with whatever else it did.",
        panels,
    )


def _milliseconds(record: Record) -> float:
    return 1e3 * record["seconds"] / record["steps"]


def _megabytes(record: Record) -> float:
    return record["peak_memory_bytes"] / 1e6


def _bars(axes: Any, records: list[Record], value: Any, label: str) -> None:
    groups = architectures(records)
    spreads = [Spread.of(map(value, own)) for own in groups.values()]
    axes.barh(
        range(len(groups)),
        [spread.mean for spread in spreads],
        xerr=[[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]],
        color=[record_look(own[0])["color"] for own in groups.values()],
        error_kw={"elinewidth": 1, "ecolor": "#333333"},
    )
    axes.set_yticks(range(len(groups)), [_in_lines(name) for name in groups])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)


def _in_lines(label: str) -> str:
    """An architecture's label, narrow enough to stand beside a bar."""
    name, *settings = label.split(", ")
    return ",\n".join([name.replace("_", "_\n"), *settings])
