"""The learning rate follows the size of the run."""

from __future__ import annotations

import math

import pytest

from jumprelu_plugin.control.learning_rate import learning_rate


def test_it_is_that_of_the_formula() -> None:
    # 1 / sqrt(640 · (30 + 0.35 · 1,000 · 4,096 / (1,024 · 40)))
    assert learning_rate(640, 4_096, 40, batch=1_024, steps=1_000) == 4.9e-3


@pytest.mark.parametrize(
    ("change", "ratio"),
    [
        ({"d_in": 4 * 577}, 1 / 2),
        ({"d_sae": 4 * 20_011}, 1 / 2),
        ({"batch": 4 * 499}, 2),
        ({"steps": 4 * 300_007}, 1 / 2),
        ({"target_l0": 4 * 37.0}, 2),
    ],
)
def test_a_long_run_takes_the_rate_of_its_noise(change: dict[str, float], ratio: float) -> None:
    run = {"d_in": 577, "d_sae": 20_011, "target_l0": 37.0, "batch": 499, "steps": 300_007}
    before, after = learning_rate(**run), learning_rate(**{**run, **change})  # type: ignore[arg-type]
    assert after / before == pytest.approx(ratio, rel=0.05)  # of two digits


def test_a_short_run_takes_a_rate_that_neither_length_nor_batch_moves() -> None:
    rates = {
        learning_rate(577, 211, 37, batch=batch, steps=steps)
        for batch in (2_003, 4_001)
        for steps in (1, 11)
    }
    (rate,) = rates
    assert rate == pytest.approx(1 / math.sqrt(30 * 577), rel=0.02)


def test_narrow_data_take_no_more_than_a_hundredth() -> None:
    assert learning_rate(31, 211, 37, batch=2_003, steps=11) == 0.01
