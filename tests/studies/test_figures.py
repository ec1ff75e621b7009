"""What the figures draw is what the records say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from jumprelu_plugin.studies.figures.distributions import densities, thresholds
from jumprelu_plugin.studies.figures.frontiers import delta_lm_loss, fvu
from jumprelu_plugin.studies.figures.groups import color, middle_target
from jumprelu_plugin.studies.figures.panel import Figure, panel_svg, save_figures
from jumprelu_plugin.studies.figures.sweep import sweep_figures
from jumprelu_plugin.studies.figures.training import cost, dynamics
from jumprelu_plugin.studies.plot import sweep_sections
from tests.studies.sweep_records import NAMES, SITES, TARGETS, sweep_records

RECORDS = sweep_records()


def drawn(figure: Figure | None, number: int = 0) -> Any:
    assert figure is not None
    axes = Canvas().subplots()
    figure.panels[number].draw(axes)
    return axes


def test_a_panel_for_each_site() -> None:
    for draw in (delta_lm_loss, fvu, densities):
        figure = draw(RECORDS)
        assert figure is not None and [panel.title for panel in figure.panels] == list(SITES)


def test_a_frontier_holds_means_and_extremes_over_seeds() -> None:
    axes = drawn(delta_lm_loss(RECORDS))
    found = {container.get_label(): container for container in axes.containers}
    assert list(found) == ["jumprelu-plugin", "topk", "standard"]
    line, _, (across, up) = found["topk"].lines
    assert line.get_xdata().tolist() == pytest.approx([1.01 * target for target in TARGETS])
    assert line.get_ydata().tolist() == pytest.approx([1.7 / t + 0.015 for t in TARGETS])
    assert np.array(across.get_segments())[:, :, 0].tolist() == [
        pytest.approx([t, 1.02 * t]) for t in TARGETS
    ]
    assert np.array(up.get_segments())[:, :, 1].tolist() == [
        pytest.approx([1.7 / t, 1.7 / t + 0.03]) for t in TARGETS
    ]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_densities_are_averaged_over_the_seeds_of_the_middle_target() -> None:
    assert middle_target(RECORDS) == 20
    axes = drawn(densities(RECORDS), 1)
    own = [
        record["density_histogram"]
        for record in RECORDS
        if (record["site"], record["architecture"]) == (SITES[1], "standard")
        and record["target_l0"] == 20
    ]
    patch = next(p for p in axes.patches if p.get_label() == "standard")
    assert patch.get_data().values.tolist() == pytest.approx(np.mean(own, 0).tolist())


def test_dynamics_and_cost() -> None:
    figure = dynamics(RECORDS)
    assert figure is not None and len(figure.panels) == 4
    l0 = {line.get_label(): line for line in drawn(figure).lines}
    assert l0["topk"].get_ydata().tolist() == pytest.approx([200, 38, 29, 26])
    coefficients = [line.get_label() for line in drawn(figure, 2).lines]
    assert coefficients == ["jumprelu-plugin", "standard"]
    bars = drawn(cost(RECORDS)).containers[-1]
    assert [bar.get_width() for bar in bars] == pytest.approx([3.5e3 / 30] * 3)


def test_architectures_keep_their_colors() -> None:
    assert len({color(name) for name in NAMES}) == 3
    assert color("jumprelu-plugin (recipe default)") == color("jumprelu-plugin")
    only = drawn(fvu([r for r in RECORDS if r["architecture"] == "standard"]))
    assert only.containers[0].lines[0].get_color() == color("standard")


def test_one_threshold_for_all_latents_is_no_histogram() -> None:
    assert thresholds([{**r, "threshold_histogram": None} for r in RECORDS]) is None
    same = {"edges": [0.1, 0.2, 0.3], "counts": [41, 0]}
    assert thresholds([{**r, "threshold_histogram": same} for r in RECORDS]) is None
    figure = thresholds(RECORDS)
    assert figure is not None and len(drawn(figure).patches) == 1


def test_records_without_a_field_leave_its_figure_out() -> None:
    known = ("site", "architecture", "target_l0", "seed", "l0", "fvu")
    figures = sweep_figures([{name: r[name] for name in known} for r in RECORDS])
    assert [figure.name for figure in figures] == ["frontier_fvu"]


def test_negative_delta_losses_are_drawn() -> None:
    changed = [{**r, "delta_lm_loss": -0.01} for r in RECORDS]
    assert drawn(delta_lm_loss(changed)).get_yscale() == "linear"


@pytest.mark.parametrize(
    ("records", "message"),
    [([], "no records"), ([{"site": "x", "l0": 3}], "has no architecture, target_l0")],
)
def test_what_is_no_sweep(records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep_figures(records)


def test_files(tmp_path: Path) -> None:
    figures = [figure for figure in sweep_figures(RECORDS) if figure.name == "frontier_fvu"]
    png, svg = save_figures(figures, tmp_path / "new")
    assert png.read_bytes()[:4] == b"\x89PNG"
    texts = {text for text in ElementTree.parse(svg).getroot().itertext() if text.strip()}
    assert {*SITES, *NAMES, "FVU against L0", "L0"} <= texts
    again = save_figures(figures, tmp_path / "again")
    assert again[1].read_text() == svg.read_text()


def test_dollar_signs_are_no_mathematics(tmp_path: Path) -> None:
    """In titles, in a legend and beside bars."""
    names = {"topk": "$5_{$ run", "standard": r"$\no$"}
    priced = [{**r, "architecture": names.get(r["architecture"], "x")} for r in RECORDS]
    figures = [f for f in sweep_figures(priced) if f.name in ("frontier_fvu", "time_and_memory")]
    assert len(save_figures(figures, tmp_path)) == 4
    for figure, shown in zip(figures, ("$5_{$ run", "$5_"), strict=True):
        for svg in (panel_svg(figure, 0), (tmp_path / f"{figure.name}.svg").read_text()):
            texts = {text.strip() for text in ElementTree.fromstring(svg).itertext()}
            assert {shown, r"$\no$"} <= texts


def test_a_panels_svg_takes_the_width_of_its_place() -> None:
    (figure,) = (figure for figure in sweep_figures(RECORDS) if figure.name == "frontier_fvu")
    root = ElementTree.fromstring(panel_svg(figure, 0))
    assert "viewBox" in root.attrib and not {"width", "height"} & set(root.attrib)
    assert panel_svg(figure, 0) == panel_svg(figure, 0)


def test_the_table_holds_means() -> None:
    (table,) = sweep_sections(RECORDS, [])[-1].tables
    assert len(table.rows) == len(SITES) * len(NAMES) * len(TARGETS)
    row = next(r for r in table.rows if r[:3] == [SITES[1], "topk", "50"])
    named = dict(zip(table.header, row, strict=True))
    assert named["seeds"] == "2" and named["L0"] == "50.5" and named["dead"] == "12.5%"
    assert math.isclose(float(named["FVU"]), 0.5 / 50 + 0.005, abs_tol=1e-4)
