"""Only seeds share a label: whatever else differs between SAEs stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.studies.figures.distributions import densities, thresholds
from jumprelu_plugin.studies.figures.frontiers import fvu
from jumprelu_plugin.studies.figures.groups import architectures, look, record_look
from jumprelu_plugin.studies.figures.settings import told_apart
from jumprelu_plugin.studies.figures.training import cost, dynamics
from jumprelu_plugin.studies.plot import plot_sweep, sweep_sections
from tests.studies.sweep_records import NAMES, SITES, sweep_records, write_records
from tests.studies.test_figures import drawn


def settings(**changes: Any) -> dict[str, Any]:
    """What a sweep records of how an SAE was trained."""
    usual = {"lr": 0.003, "lr_by_rule": False, "d_sae": 64, "batch": 128, "cache_dtype": "float32"}
    return {**usual, **changes}


def swept(**changes: Any) -> list[dict[str, Any]]:
    return [{**record, **settings(**changes)} for record in sweep_records()]


def labels(*records: dict[str, Any]) -> list[str]:
    return list(architectures(told_apart(records)))


def test_records_that_differ_in_nothing_keep_their_names() -> None:
    assert labels(*swept()) == ["jumprelu-plugin", "topk", "standard"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 3e-05}, ["lr 3e-05", "lr 0.003"]),
        ({"lr_by_rule": True}, ["lr 0.003", "lr by rule"]),
        ({"d_sae": 127}, ["d_sae 64", "d_sae 127"]),
        ({"batch": 31}, ["batch 31", "batch 128"]),
        ({"steps": 7}, ["steps 7", "steps 30"]),
        ({"cache_dtype": "int8"}, ["cache_dtype float32", "cache_dtype int8"]),
        ({"cache_dtype": None}, ["cache_dtype float32", "cache_dtype not recorded"]),
        ({"provenance": {"model_digest": "3f"}}, ["weights 3f", "weights not recorded"]),
        ({"provenance": {"data_digest": "3f"}}, ["held-out text 3f", "held-out text not recorded"]),
        ({"lr": 0.01, "d_sae": 127}, ["lr 0.003, d_sae 64", "lr 0.01, d_sae 127"]),
    ],
)
def test_the_label_says_what_differs(changes: dict[str, Any], named: list[str]) -> None:
    found = labels(*swept(), *swept(**changes))
    assert [label for label in found if label.startswith("topk")] == [f"topk, {n}" for n in named]
    assert len(found) == 2 * len(NAMES)


def test_a_learning_rate_of_each_architecture_is_no_difference() -> None:
    own = {"topk": 0.006, "standard": 0.012, "jumprelu-plugin": 0.003}
    records = [{**record, "lr": own[record["architecture"]]} for record in swept()]
    assert labels(*records) == ["jumprelu-plugin", "topk", "standard"]
    by_rule = [{**record, "lr": record["target_l0"], "lr_by_rule": True} for record in swept()]
    assert labels(*by_rule) == ["jumprelu-plugin", "topk", "standard"]


def test_another_width_is_named_where_architectures_are_compared() -> None:
    narrow = [r for r in swept(d_sae=31) if r["architecture"] == "topk"]
    wide = [r for r in swept(d_sae=127) if r["architecture"] == "standard"]
    assert labels(*narrow, *wide) == ["topk, d_sae 31", "standard, d_sae 127"]
    elsewhere = [{**record, "model": "another"} for record in wide]
    assert labels(*narrow, *elsewhere) == ["topk", "standard"]


def test_every_figure_shows_the_labels() -> None:
    records = told_apart([*swept(), *swept(lr=3e-05)])
    expected = {f"{name}, lr {rate}" for name in NAMES for rate in ("3e-05", "0.003")}
    for draw in (fvu, densities, dynamics):
        assert set(drawn(draw(records)).get_legend_handles_labels()[1]) == expected
    assert len(drawn(thresholds(records)).patches) == 2
    bars = drawn(cost(records))
    ticks = {tick.get_text().replace("\n", " ") for tick in bars.get_yticklabels()}
    assert ticks == expected
    (table,) = sweep_sections(records, [])[-1].tables
    assert {row[1] for row in table.rows} == expected and {row[3] for row in table.rows} == {"2"}


def test_labels_of_one_architecture_look_different() -> None:
    records = told_apart([r for rate in range(1, 8) for r in swept(lr=0.001 * rate)])
    looks = [record_look(own[0]) for own in architectures(records).values()]
    assert len({tuple(found.values()) for found in looks}) == 7 * len(NAMES)
    own = [record_look(o[0]) for name, o in architectures(records).items() if "topk" in name]
    assert own[0] == look("topk") and len({found["color"] for found in own[:5]}) == 5


def test_plotting_one_folder_with_two_learning_rates(tmp_path: Path) -> None:
    """As a sweep writes them that is run again with another rate."""
    one_seed = [r for rate in (0.003, 3e-05) for r in swept(lr=rate) if r["seed"] == 0]
    file = write_records(tmp_path / "records.jsonl", one_seed)
    page = plot_sweep([file, tmp_path], tmp_path / "out").read_text()  # each record is read twice
    assert f"{len(one_seed)} SAEs of tiny" in page
    for site in SITES:
        assert f"<td>{site}</td><td>topk, lr 0.003</td><td>10</td><td>1</td>" in page
