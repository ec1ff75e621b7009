"""Draw the documents' tables and figure of speed from the records, and nothing else.

    python -m benchmarks.report

Every block between `<!-- speed:NAME -->` and `<!-- /speed -->` is replaced by what the records say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.speed import IN_SWEEPS, PRODUCT, RESULTS, megabytes
from benchmarks.tables import FIGURES, ROOT, Records, commits, fill, read, seconds, table
from benchmarks.trainers import AUTO, SCREENED, SPARSE, STOCK

DOCUMENTS = (ROOT / "docs" / "results.md", ROOT / "docs" / "ablations.md")
FIGURE = FIGURES / "speed.png"
# Measured by `benchmarks.speed.measure`, at the first of the shapes alone.
SECOND = RESULTS.with_name("speed_second_machine.jsonl")

COLORS = {SPARSE: "#1b6ca8", SCREENED: "#2a9d8f", AUTO: "#e9a03b", STOCK: "#555555"}


def shapes(records: Records) -> str:
    """All trainers at each of the shapes."""
    parts = []
    for title, group in _by_shape([r for r in records if r["sweep"] == "shapes"]):
        stock = _one(group, STOCK)
        rows = [
            (
                r["trainer"],
                seconds(r["median_seconds"]),
                f"{stock['median_seconds'] / r['median_seconds']:.1f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['share_of_one_product']:.0%}",
                _megabytes(r, stock),
            )
            for r in sorted(group, key=lambda r: r["median_seconds"])
        ]
        header = ("", "s/step", "× stock", "tokens/s", "of one product", "peak MB (of stock's)")
        parts.append(f"{title}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def passes(records: Records) -> str:
    """Forward and backward pass alone, and how much of them is the one product."""
    rows = []
    for title, group in _by_shape([r for r in records if r["sweep"] == "shapes"]):
        stock = _one(group, STOCK)["forward_backward_seconds"]
        for name in (SPARSE, SCREENED, STOCK):
            r = _one(group, name)
            took = r["forward_backward_seconds"]
            share = f"{r['product_share_of_passes']:.0%}"
            rows.append((title, name, seconds(took), f"{stock / took:.1f}", share))
    return table(("", "", "forward + backward, s", "× stock", "one product's share"), rows, names=2)


def sweep(name: str) -> Callable[[Records], str]:
    """A table over the values of one size: seconds of a step, and how many times stock's speed."""

    def draw(records: Records) -> str:
        rows = []
        chosen = [r for r in records if r["sweep"] == name]
        for value in sorted({r[name] for r in chosen}):
            group = [r for r in chosen if r[name] == value]
            stock = _one(group, STOCK)["median_seconds"]
            cells = [f"{value:g}"]
            for trainer in IN_SWEEPS:
                took = _one(group, trainer)["median_seconds"]
                cells.append(f"{seconds(took)} ({stock / took:.1f}×)")
            rows.append(tuple(cells))
        return table((name, *IN_SWEEPS), rows)

    return draw


def origin(records: Records) -> str:
    """Where the records come from."""
    source = records[0]["provenance"]
    hardware, versions = source["hardware"], source["versions"]
    libraries = {r["product_library"] for r in records if r["product_library"]}
    machine = f"{hardware['threads']} threads of {hardware['cpu']}"
    return (
        f"Measured {source['time_utc'][:10]} at {commits(records)} on {machine}, PyTorch "
        f"{versions['torch']}, SAELens {versions['sae-lens']}; the full-precision product went "
        f"through {' and '.join(sorted(libraries))}."
    )


def on_second_machine(draw: Callable[[Records], str]) -> Callable[[Records], str]:
    """The same of the records of another machine."""
    return lambda _: draw(read(SECOND))


BLOCKS: dict[str, Callable[[Records], str]] = {
    "origin": origin,
    "second_origin": on_second_machine(origin),
    "second_shapes": on_second_machine(shapes),
    "shapes": shapes,
    "passes": passes,
    "d_sae": sweep("d_sae"),
    "l0": sweep("l0"),
}


def draw(records: Records, path: Path) -> None:
    """How a step grows with the dictionary and with L0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    labels = {"d_sae": "latents in the dictionary", "l0": "active latents a token"}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        chosen = [r for r in records if r["sweep"] == name]
        values = sorted({r[name] for r in chosen})
        for trainer in (STOCK, SPARSE, SCREENED, AUTO, PRODUCT):
            line = [_one([r for r in chosen if r[name] == v], trainer) for v in values]
            axis.plot(
                values,
                [r["median_seconds"] for r in line],
                label=trainer,
                color=COLORS.get(trainer, "#bbbbbb"),
                linestyle=":" if trainer == PRODUCT else "-",
                marker=None if trainer == PRODUCT else "o",
                markersize=4,
            )
        fixed = chosen[0]
        names = {"d_in": "d_in", "d_sae": "d_sae", "batch": "batch", "l0": "L0"}
        others = [f"{shown} {fixed[n]:g}" for n, shown in names.items() if n != name]
        axis.set(xscale="log", yscale="log", xlabel=label, title=", ".join(others))
        axis.set_xticks(values, [f"{value:,.0f}" for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0].set_ylabel("seconds a training step")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_shape(records: Records) -> Iterable[tuple[str, Records]]:
    groups: dict[str, Records] = {}
    for r in records:
        title = f"d_in {r['d_in']}, d_sae {r['d_sae']}, batch {r['batch']}, L0 {r['l0']:g}"
        groups.setdefault(title, []).append(r)
    return groups.items()


def _one(records: Records, trainer: str) -> dict[str, Any]:
    return next(r for r in records if r["trainer"] == trainer)


def _megabytes(record: dict[str, Any], stock: dict[str, Any]) -> str:
    if record.get("memory") is None:
        return ""
    own, of_stock = megabytes(record["memory"]), megabytes(stock["memory"])
    return f"{own:,.0f} ({own / of_stock:.2f})"


def main(
    records: Annotated[Path, typer.Option(help="Records of benchmarks.speed.")] = RESULTS,
    documents: Annotated[list[Path] | None, typer.Argument(help="Documents; all.")] = None,
    figure: Annotated[Path, typer.Option(help="Where the figure goes.")] = FIGURE,
) -> None:
    """Fill the documents and draw the figure."""
    found = read(records)
    blocks = {name: functools.partial(block, found) for name, block in BLOCKS.items()}
    for document in documents or DOCUMENTS:
        filled = fill(document.read_text(encoding="utf-8"), "speed", blocks)
        document.write_text(filled, encoding="utf-8")
        print(f"{document} drawn from {records}")
    draw(found, figure)


if __name__ == "__main__":
    typer.run(main)
