"""All figures of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from jumprelu_plugin.studies.figures.distributions import densities, thresholds
from jumprelu_plugin.studies.figures.frontiers import (
    dead_latents,
    delta_lm_loss,
    dense_latents,
    fvu,
    uniformity,
)
from jumprelu_plugin.studies.figures.groups import Record
from jumprelu_plugin.studies.figures.panel import Figure
from jumprelu_plugin.studies.figures.training import cost, dynamics

DRAWN = (
    delta_lm_loss,
    fvu,
    densities,
    dense_latents,
    dead_latents,
    uniformity,
    thresholds,
    dynamics,
    cost,
)


def sweep_figures(records: Sequence[Record]) -> list[Figure]:
    """Every figure for which the records hold the numbers.

    Raises:
        ValueError: there are no records, or they are not of a sweep.
    """
    if not records:
        raise ValueError("there are no records to draw")
    require_sweep(records)
    return [figure for draw in DRAWN if (figure := draw(records)) is not None]


def require_sweep(records: Sequence[Record]) -> None:
    """Refuse records that are not of a sweep.

    Raises:
        ValueError: a record lacks what every figure needs.
    """
    for record in records:
        missing = [n for n in ("site", "architecture", "target_l0", "l0") if n not in record]
        if missing:
            raise ValueError(
                f"a record has no {', '.join(missing)}: give records of jumprelu sweep"
            )
