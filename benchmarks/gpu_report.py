"""Draw the page's tables and figure of GPU speed from the records; without records they say so.

    python -m benchmarks.gpu_report

Every block between `<!-- gpu:NAME -->` and `<!-- /gpu -->` is replaced by what the records say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu import IN_SWEEP, RESULTS
from benchmarks.tables import FIGURES, ROOT, Records, fill, read, table
from benchmarks.trainers import STOCK, TRITON

DOCUMENT = ROOT / "docs" / "results.md"
FIGURE = FIGURES / "gpu.png"
NOT_MEASURED = "Not measured: there are no records of it on a GPU yet."
SIZES = ("d_in", "d_sae", "batch", "l0")


def latest(records: Records, part: str) -> Records:
    """The last record of each case of a part."""
    kept: dict[Any, dict[str, Any]] = {}
    for r in records:
        if r["part"] == part:
            sizes = tuple(r.get(name) for name in SIZES)
            kept[r["device_name"], sizes, r.get("trainer"), r.get("dictionaries")] = r
    return list(kept.values())


def origin(records: Records) -> str:
    """Where and when the records were made."""
    devices = sorted({r["device_name"] for r in records})
    last = records[-1]["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    commit = ((last.get("git") or {}).get("commit") or "unknown")[:10]
    return f"Measured on {', '.join(devices)} at commit {commit} ({versions})."


def shapes(records: Records) -> str:
    """Every trainer at each shape."""
    parts = []
    for title, group in _by_shape(latest(records, "shapes")):
        products = [r for r in group if r["trainer"].startswith("one product") and "error" not in r]
        one = next((r["median_seconds"] for r in products if "float32" in r["trainer"]), None)
        stock = next((r.get("median_seconds") for r in group if r["trainer"] == STOCK), None)
        rows = []
        for r in sorted(group, key=lambda r: r.get("median_seconds", float("inf"))):
            if "error" in r:
                rows.append((r["trainer"], r["error"], "", "", "", "", ""))
                continue
            took, peak = r["median_seconds"], r.get("peak_bytes")
            passes = r.get("forward_backward_seconds")
            rows.append(
                (
                    r["trainer"],
                    f"{1e3 * took:.2f}",
                    "" if stock is None else f"{stock / took:.1f}",
                    f"{r['batch'] / took:,.0f}",
                    "" if passes is None else f"{1e3 * passes:.2f}",
                    "" if one is None else f"{one / took:.0%}",
                    "" if peak is None else f"{peak / 1e9:.1f}",
                )
            )
        header = (
            "",
            "ms/step",
            "× stock",
            "tokens/s",
            "fwd + bwd, ms",
            "of one fp32 product",
            "peak GB",
        )
        parts.append(f"{title}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def l0(records: Records) -> str:
    """Milliseconds a step against L0."""
    rows = []
    chosen = [r for r in latest(records, "l0") if "error" not in r]
    for value in sorted({r["l0"] for r in chosen}):
        took = {r["trainer"]: r["median_seconds"] for r in chosen if r["l0"] == value}
        cells = (f"{1e3 * took[name]:.2f}" if name in took else "" for name in IN_SWEEP)
        rows.append((f"{value:g}", *cells))
    return table(("L0", *IN_SWEEP), rows)


def clt(records: Records) -> str:
    """A cross-layer transcoder's step by each of its kernels."""
    chosen = [r for r in latest(records, "clt") if "error" not in r]
    if not chosen:
        return ""
    r = chosen[0]
    rows = [
        (
            r["trainer"],
            f"{1e3 * r['median_seconds']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
            "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f}",
        )
        for r in sorted(chosen, key=lambda r: r["median_seconds"])
    ]
    title = f"{r['layers']} layers, {_title(r)} ({r['device_name']})"
    return f"{title}\n\n{table(('', 'ms/step', 'tokens/s', 'peak GB'), rows)}"


def harvest(records: Records) -> str:
    """Tokens a second against the number of dictionaries."""
    chosen = [r for r in latest(records, "harvest") if "error" not in r]
    rows = [(str(r["dictionaries"]), f"{r['tokens_per_second']:,.0f}") for r in chosen]
    return table(("dictionaries", "tokens/s"), rows)


def kernels(records: Records) -> str:
    """The longest kernels of this package's step."""
    parts = []
    for r in latest(records, "profile"):
        if "error" not in r and r["trainer"] == TRITON:
            spent = list(r["kernel_milliseconds"].items())[:8]
            rows = [(f"`{short_name(name)}`", f"{took:.2f}") for name, took in spent]
            title = f"{r['trainer']}, {_title(r)}: {r['all_milliseconds']:.2f} ms in kernels"
            parts.append(f"{title}\n\n{table(('', 'ms'), rows)}")
    return "\n\n".join(parts)


def short_name(kernel: str) -> str:
    """A kernel's name without its types: what it is called, and the functor it applies."""
    called = re.sub(r"void |\(anonymous namespace\)", "", kernel)
    plain = re.split("[<(]", called)[0].split("::")[-1]
    functor = re.search(r"\w+(Functor|_kernel_cuda)\b", called)
    return plain if functor is None or functor[0] == plain else f"{plain}, {functor[0]}"


def picture(records: Records) -> str:
    """A link to the figure."""
    shown = any(r["part"] == "shapes" for r in records)
    return "![Milliseconds a step by trainer, and against L0](figures/gpu.png)" if shown else ""


BLOCKS = {
    "origin": origin,
    "shapes": shapes,
    "figure": picture,
    "l0": l0,
    "clt": clt,
    "harvest": harvest,
    "kernels": kernels,
}


def draw(records: Records, path: Path) -> None:
    """Milliseconds a step: bars at each shape, and curves over L0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(_by_shape([r for r in latest(records, "shapes") if "error" not in r]))
    rows = -(-(len(groups) + 1) // 2)
    figure, grid = pyplot.subplots(rows, 2, figsize=(11, 3.6 * rows), layout="constrained")
    panels = list(grid.flat)[: len(groups) + 1]
    for panel, (title, group) in zip(panels, groups, strict=False):
        trainers = (r for r in group if not r["trainer"].startswith("one product"))
        group = sorted(trainers, key=lambda r: -r["median_seconds"])
        colors = ["#1b6ca8" if "plugin" in r["trainer"] else "#888888" for r in group]
        panel.barh(
            [r["trainer"].removeprefix("jumprelu-") for r in group],
            [1e3 * r["median_seconds"] for r in group],
            color=colors,
        )
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("ms a step")
    sweep = [r for r in latest(records, "l0") if "error" not in r]
    for name in IN_SWEEP:
        points = sorted((r["l0"], 1e3 * r["median_seconds"]) for r in sweep if r["trainer"] == name)
        if points:
            panels[-1].plot(*zip(*points, strict=True), marker="o", label=name)
    panels[-1].set(xlabel="L0", ylabel="ms a step", xscale="log", yscale="log")
    panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _title(r: dict[str, Any]) -> str:
    return f"d_in {r['d_in']}, d_sae {r['d_sae']}, batch {r['batch']}, L0 {r['l0']:g}"


def _by_shape(records: Iterable[dict[str, Any]]) -> Iterable[tuple[str, Records]]:
    groups: dict[str, Records] = {}
    for r in records:
        groups.setdefault(f"{_title(r)} ({r['device_name']})", []).append(r)
    return groups.items()


def filled(text: str, found: Records) -> str:
    """The page's text with every block drawn from the records."""
    blocks = {
        name: (lambda draw_block=block: draw_block(found) or NOT_MEASURED)
        if found
        else (lambda: NOT_MEASURED)
        for name, block in BLOCKS.items()
    }
    return fill(text, "gpu", blocks)


def main(
    records: Annotated[Path, typer.Option(help="Records of benchmarks.gpu.")] = RESULTS,
    document: Annotated[Path, typer.Option(help="The page to fill.")] = DOCUMENT,
    figure: Annotated[Path, typer.Option(help="Where the figure goes.")] = FIGURE,
) -> None:
    """Fill the page from the records, and draw the figure if there are any."""
    found = read(records) if records.exists() else []
    document.write_text(filled(document.read_text(), found))
    if any(r["part"] == "shapes" for r in found):
        draw(found, figure)


if __name__ == "__main__":
    typer.run(main)
