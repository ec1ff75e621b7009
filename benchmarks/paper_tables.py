"""The tables and figures of the paper's comparison, from the records of two sweeps.

    jumprelu sweep benchmarks/paper_grid.yaml --output_path output/paper_grid --train_together 1

The records are the sweep's `records.jsonl`. `paper_grid_gemma.yaml` is the same on Gemma 3 270M,
where some architectures do not land on the L0 they are given. They were trained again for others,
and a row has of each architecture the SAE whose L0 on held-out text is nearest to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS, Records, commits, mean, read, table
from jumprelu_plugin.studies.figures.frontiers import delta_lm_loss
from jumprelu_plugin.studies.figures.groups import architectures, places
from jumprelu_plugin.studies.figures.panel import save_figures

# Farther from the row's L0 than this, a cell says its L0.
FAR = 0.05


@dataclass(frozen=True)
class Grid:
    """What a sweep of the paper's architectures gave.

    Attributes:
        path: its records.
        l0s: of the rows.
        middle: the one at which latents are compared.
    """

    path: Path
    l0s: tuple[int, ...]
    middle: int

    def delta(self) -> str:
        """Delta LM loss of every architecture at each site and L0."""
        return self._fidelity("delta_lm_loss", ".3f")

    def fvu(self) -> str:
        """FVU of every architecture at each site and L0."""
        return self._fidelity("fvu", ".3f")

    def latents(self) -> str:
        """What the latents of every architecture are at one L0."""
        records = nearest(read(self.path), self.middle)
        rows = [
            (
                _title(site),
                name,
                f"{mean(group, 'l0'):.1f}",
                f"{mean(group, 'dead_share'):.1%}",
                f"{mean(group, 'share_above_1_percent'):.0%}",
                f"{mean(group, 'share_above_10_percent'):.2%}",
                f"{mean(group, 'uniformity'):.3f}",
            )
            for site, here in places(records).items()
            for name, group in architectures(here).items()
        ]
        header = ("", "", "L0", "dead", "above 1 %", "above 10 %", "uniformity")
        return f"{table(header, rows, names=2)}\n\n{_setting(records)}"

    def draw_frontier(self, path: Path) -> None:
        """Delta LM loss against L0 at each site, for every architecture."""
        figure = delta_lm_loss(read(self.path))
        assert figure is not None  # every record has a delta LM loss
        save_figures([replace(figure, name=path.stem)], path.parent)
        path.with_suffix(".svg").unlink()  # the document shows the PNG

    def _fidelity(self, field: str, form: str) -> str:
        records = read(self.path)
        names = list(architectures(records))
        rows = []
        for site, here in places(records).items():
            for l0 in self.l0s:
                at = architectures(nearest(here, l0))
                best = min(mean(group, field) for group in at.values() if not _is_far(group, l0))
                cells = [_cell(at[name], l0, field, form, best) for name in names]
                rows.append((_title(site), f"{l0:g}", *cells))
        header = ("", "L0", *names)
        return f"{table(header, rows)}\n\n{_setting(records)}"


EMBEDDED = Grid(RESULTS / "paper_grid.jsonl", (4, 8, 16, 32), middle=16)
GEMMA = Grid(RESULTS / "paper_grid_gemma.jsonl", (10, 20, 40), middle=20)


def nearest(records: Records, l0: float) -> Records:
    """Of each architecture, site and seed the record whose L0 on held-out text is nearest.

    Where some seeds of an architecture are near, those that are not are left out.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: abs(math.log(r["l0"] / l0))):
        found.setdefault((record["site"], record["architecture"], record["seed"]), record)
    near = {(site, name) for (site, name, _), r in found.items() if not _is_far([r], l0)}
    chosen = {
        id(record)
        for (site, name, _), record in found.items()
        if not _is_far([record], l0) or (site, name) not in near
    }
    return [record for record in records if id(record) in chosen]


def _cell(group: Any, l0: float, field: str, form: str, best: float) -> str:
    value = mean(group, field)
    shown = f"{value:{form}}"
    if _is_far(group, l0):
        return f"{shown} (L0 {mean(group, 'l0'):.1f})"
    return f"**{shown}**" if value == best else shown


def _is_far(group: Records, l0: float) -> bool:
    return abs(mean(group, "l0") / l0 - 1) > FAR


def _title(site: str) -> str:
    return f"`{site.removeprefix('blocks.')}`"


def _setting(records: Records) -> str:
    first = records[0]
    seeds = {len({r["seed"] for r in here}) for here in places(records).values()}
    averaged = "one seed" if seeds == {1} else f"mean of {' or '.join(map(str, seeds))} seeds"
    return (
        f"{first['d_sae']:,} latents, {first['steps']:,} steps of {first['batch']:,} tokens, "
        f"{averaged}, {first['held_out_tokens']:,} held-out tokens; {commits(records)}."
    )
