"""What the figures of a study draw is what its latents say."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from matplotlib.figure import Figure as Canvas

from jumprelu_plugin.studies.explain.figures import correlation_by_density, correlation_violins
from jumprelu_plugin.studies.explain.scoring import ScoredLatent
from jumprelu_plugin.studies.figures.panel import Figure
from tests.studies.explain.results import explanation_result

RESULT = explanation_result()
BY_LABEL = {
    label: [each for each in RESULT.latents if each.label == label] for label in RESULT.labels
}


def drawn(figure: Figure | None, number: int) -> Any:
    assert figure is not None
    axes = Canvas().subplots()
    figure.panels[number].draw(axes)
    return axes


def test_a_violin_for_each_sae_beside_its_nulls() -> None:
    figure = correlation_violins(BY_LABEL, RESULT.explained_above)
    assert figure is not None and f"{RESULT.explained_above:.3f}" in figure.caption
    for number, name in enumerate(("correlation", "shuffled", "random_token")):
        axes = drawn(figure, number)
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["jumprelu-plugin", "topk"]
        # The ticks at the medians are the only segments that are 0.4 high, half a violin's width.
        medians = [
            segment[0][0]
            for lines in axes.collections
            if hasattr(lines, "get_segments")
            for segment in lines.get_segments()
            if segment[0][0] == segment[1][0]
        ]
        for own in BY_LABEL.values():
            values = [v for e in own if (v := getattr(e, name)) is not None]
            assert any(m == pytest.approx(statistics.median(values)) for m in medians)
    limits = [drawn(figure, number).get_xlim() for number in range(3)]
    assert limits[0] == limits[1] == limits[2]  # so that panels can be compared


def test_a_point_for_each_latent() -> None:
    axes = drawn(correlation_by_density(BY_LABEL), 0)
    points = axes.collections[0].get_offsets().tolist()
    own = [e for e in BY_LABEL["jumprelu-plugin"] if e.correlation is not None]
    assert points == [[pytest.approx(e.density), pytest.approx(e.correlation)] for e in own]


def test_latents_without_a_correlation() -> None:
    none = ScoredLatent("a", "/a", 3, 0.1, 0, None)
    assert correlation_violins({"a": [none]}, None) is None
    assert correlation_by_density({"a": [none]}) is None
    one = ScoredLatent("a", "/a", 3, 0.1, 0, "seas", correlation=0.25)
    axes = drawn(correlation_violins({"a": [one], "b": [none]}, None), 0)
    assert axes.get_lines()[0].get_xdata().tolist() == [0.25]
