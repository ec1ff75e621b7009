"""The tables of explanations compare architectures at matched L0."""

from __future__ import annotations

import pytest

from benchmarks import explanation_tables
from benchmarks.paper_tables import FAR


@pytest.mark.parametrize(
    ("study", "target"), [(explanation_tables.EMBEDDED, 16), (explanation_tables.GEMMA, 20)]
)
def test_every_architecture_is_at_the_target(
    study: explanation_tables.Explanations, target: float
) -> None:
    assert study.l0() == {
        label: pytest.approx(target, rel=FAR)
        for label in ("jumprelu-plugin", "gated", "topk", "batchtopk")
    }
