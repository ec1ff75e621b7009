"""What the learning rate's rule costs on the runs it was fitted to."""

from __future__ import annotations

import math

import pytest

from benchmarks.learning_rates import OUTPUT, RUN, cost
from benchmarks.tables import Records, read
from jumprelu_plugin.control.learning_rate import learning_rate


def test_the_cost_of_a_rate_is_exact_on_a_parabola() -> None:
    def fvu(rate: float) -> float:
        return 0.13 * math.exp(0.07 * math.log(rate / 5e-3) ** 2)

    found = {rate: fvu(rate) for rate in (1e-3, 4e-3, 9e-3, 1.7e-2)}
    assert cost(found, 7e-3) == pytest.approx(fvu(7e-3) / 0.13 - 1, rel=1e-3)


def test_the_rule_gives_away_no_more_than_two_percent() -> None:
    runs: dict[tuple[object, ...], Records] = {}
    for record in read(OUTPUT):
        runs.setdefault(tuple(record[name] for name in RUN), []).append(record)
    assert len(runs) >= 18
    for run, records in runs.items():
        found = {record["lr"]: record["fvu"] for record in records}
        assert cost(found, learning_rate(*run[2:])) < 0.02, run  # type: ignore[arg-type]
