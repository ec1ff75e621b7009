"""The tables and figures of the paper's comparison, from the records of two sweeps.

    jumprelu sweep benchmarks/paper_grid.yaml --output_path output/paper_grid --train_together 1

and the same with `--architectures jumprelu-plugin --lr 1.2e-2`; the records are the two sweeps'
`records.jsonl`, one after the other. `paper_grid_gemma.yaml` is the same on Gemma 3 270M.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS, Records, commits, mean, read, table
from jumprelu_plugin.studies.figures.frontiers import delta_lm_loss
from jumprelu_plugin.studies.figures.groups import architectures, places
from jumprelu_plugin.studies.figures.panel import save_figures

# Farther from its target than this, a cell says its L0.
FAR = 0.05


@dataclass(frozen=True)
class Grid:
    """What a sweep of the paper's architectures gave.

    Attributes:
        path: its records.
        middle: the L0 at which latents are compared.
    """

    path: Path
    middle: int

    def delta(self) -> str:
        """Delta LM loss of every architecture at each site and target L0."""
        return self._fidelity("delta_lm_loss", ".3f")

    def fvu(self) -> str:
        """FVU of every architecture at each site and target L0."""
        return self._fidelity("fvu", ".3f")

    def latents(self) -> str:
        """What the latents of every architecture are at one target L0."""
        records = [r for r in read(self.path) if r["target_l0"] == self.middle]
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
            for target in sorted({r["target_l0"] for r in here}):
                at = architectures(r for r in here if r["target_l0"] == target)
                best = min(mean(group, field) for group in at.values() if not _is_far(group))
                cells = [_cell(at[name], field, form, best) for name in names]
                rows.append((_title(site), f"{target:g}", *cells))
        header = ("", "L0", *names)
        return f"{table(header, rows)}\n\n{_setting(records)}"


EMBEDDED = Grid(RESULTS / "paper_grid.jsonl", middle=16)
GEMMA = Grid(RESULTS / "paper_grid_gemma.jsonl", middle=20)


def _cell(group: Any, field: str, form: str, best: float) -> str:
    value = mean(group, field)
    shown = f"{value:{form}}"
    if _is_far(group):
        return f"{shown} (L0 {mean(group, 'l0'):.1f})"
    return f"**{shown}**" if value == best else shown


def _is_far(group: Records) -> bool:
    return abs(mean(group, "l0") / group[0]["target_l0"] - 1) > FAR


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
