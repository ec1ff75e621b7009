"""Draw the tables of docs/results.md and docs/ladder.md from the records, and nothing else.

python -m benchmarks.quality_report
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.ladder import OWN_L0 as LADDER_OWN_L0
from benchmarks.synthetic import RESULTS as SYNTHETIC
from benchmarks.tables import Records, fill, read, table

DOCUMENTS = tuple(Path(__file__).parents[1] / "docs" / name for name in ("results.md", "ladder.md"))
COMPARE, TARGETS, LADDER = (
    SYNTHETIC.with_name(f"{name}.jsonl") for name in ("compare", "targets", "ladder")
)


def known_features(d_sae: int) -> str:
    """Every architecture at one width, best F1 first."""
    records = [r for r in read(SYNTHETIC) if r["d_sae"] == d_sae]
    groups: dict[str, Records] = {}
    for r in records:
        asked = "" if r["l0_asked"] == 8.0 else f", asked for {r['l0_asked']:g}"
        groups.setdefault(r["architecture"] + asked, []).append(r)
    rows = [
        (
            name,
            str(len(group)),
            _spread(group, "mcc", 3),
            _spread(group, "f1", 3),
            _spread(group, "explained_variance", 3),
            _spread(group, "l0", 2),
            f"{_mean(group, 'dead_share'):.1%}",
        )
        for name, group in sorted(groups.items(), key=lambda item: -_mean(item[1], "f1"))
    ]
    return table(("", "seeds", "MCC", "F1", "explained variance", "L0", "dead"), rows)


def compared() -> str:
    """Every architecture at each L0 asked for, lowest FVU first."""
    records = read(COMPARE)
    rows = []
    for l0 in sorted({r["l0_asked"] for r in records}):
        names = {r["architecture"] for r in records if r["l0_asked"] == l0}
        groups = [
            [r for r in records if r["l0_asked"] == l0 and r["architecture"] == name]
            for name in names
        ]
        for group in sorted(groups, key=lambda group: _mean(group, "fvu")):
            rows.append(
                (
                    f"{l0:g}",
                    group[0]["architecture"],
                    str(len(group)),
                    _spread(group, "l0", 2),
                    _spread(group, "fvu", 4),
                    _spread(group, "delta_lm_loss", 3),
                    f"{_mean(group, 'dead_share'):.1%}",
                    f"{_mean(group, 'share_above_10_percent'):.2%}",
                )
            )
    header = ("L0 asked", "", "seeds", "L0", "FVU", "delta LM loss", "dead", "above 10 % of tokens")
    return table(header, rows)


def targets() -> str:
    """The L0 each site reached, and what came with it."""
    rows = [
        (
            f"{r['model']} {r['site']}",
            f"{r['d_sae']:,}",
            f"{r['l0_asked']:g}",
            f"{r['l0']:.2f}",
            f"{r['off_by']:.1%}",
            f"{r['fvu']:.3f}",
            f"{r['dead_share']:.1%}",
            f"{r['share_above_10_percent']:.2%}",
        )
        for r in sorted(
            read(TARGETS), key=lambda r: (r["d_sae"], r["model"], r["site"], r["l0_asked"])
        )
    ]
    header = ("", "latents", "asked", "L0", "off by", "FVU", "dead", "above 10 % of tokens")
    return table(header, rows)


def ladder() -> str:
    """FVU at each L0, a row for each way to get there, and the L0 where it is 1 % off or more."""
    records = [r for r in read(LADDER) if r["l0_asked"] != LADDER_OWN_L0]
    asked = sorted({r["l0_asked"] for r in records})
    rows = []
    for how in dict.fromkeys(r["how"] for r in sorted(records, key=lambda r: r["steps"])):
        at = {r["l0_asked"]: r for r in records if r["how"] == how}
        steps = str(at[asked[0]]["steps"])
        rows.append((how, steps, *(_at_l0(at[l0]) for l0 in asked)))
    return table(("", "steps", *(f"L0 {l0:g}: FVU" for l0 in asked)), rows)


BLOCKS = {
    "ladder": ladder,
    "features_512": lambda: known_features(512),
    "features_2048": lambda: known_features(2048),
    "compared": compared,
    "targets": targets,
}


def _at_l0(record: Mapping[str, float]) -> str:
    off = f" (L0 {record['l0']:.1f})" if record["off_by"] >= 0.01 else ""
    return f"{record['fvu']:.3f}{off}"


def _values(records: Iterable[dict], name: str) -> Sequence[float]:
    return [r[name] for r in records]


def _mean(records: Records, name: str) -> float:
    return statistics.mean(_values(records, name))


def _spread(records: Records, name: str, digits: int) -> str:
    values = _values(records, name)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(
    documents: Annotated[list[Path] | None, typer.Argument(help="What to fill; all.")] = None,
) -> None:
    """Fill the documents."""
    for document in documents or DOCUMENTS:
        filled = fill(document.read_text(encoding="utf-8"), "results", BLOCKS)
        document.write_text(filled, encoding="utf-8")
        print(f"{document} drawn from {SYNTHETIC.parent}")


if __name__ == "__main__":
    typer.run(main)
