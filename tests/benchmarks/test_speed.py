"""The benchmark runs on small shapes, its records say where they come from, the page is drawn."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import passes, report, speed, tables
from benchmarks.measure import peak_memory
from benchmarks.speed import IN_SWEEPS, PRODUCT, Plan, measure
from benchmarks.trainers import SPARSE, STOCK, TRAINERS, Shape, missing_trainers
from jumprelu_plugin.records import append_jsonl, provenance

SMALL = Shape(29, 211, 53, 7)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    everyone = [name for name in TRAINERS if name not in missing_trainers()]
    path = tmp_path_factory.mktemp("records") / "speed.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for sweep, shapes in {
        "shapes": [SMALL],
        "d_sae": [SMALL, Shape(29, 331, 53, 7)],
        "l0": [SMALL, Shape(29, 211, 53, 41)],
    }.items():
        who = everyone if sweep == "shapes" else IN_SWEEPS
        for shape in shapes:
            for record in measure(Plan(sweep, shapes, who, 2, False), shape):
                append_jsonl(path, {**record, "provenance": provenance(seed=0)})
    torch.set_num_threads(threads)
    return path


def test_every_trainer_is_measured_at_the_target_l0(records: Path) -> None:
    found = {r["trainer"]: r for r in tables.read(records) if r["sweep"] == "shapes"}
    assert set(found) == {PRODUCT, *TRAINERS} - set(missing_trainers())
    for name, record in found.items():
        assert record["median_seconds"] > 0 and len(record["seconds"]) == 2
        if "jumprelu" in name.lower() or "plugin" in name or "topk" in name:
            assert record["measured_l0"] == pytest.approx(SMALL.l0, rel=0.35), name
    product, ours = found[PRODUCT], found[SPARSE]
    expected = product["median_seconds"] / ours["median_seconds"]
    assert ours["share_of_one_product"] == pytest.approx(expected)


def test_the_page_is_drawn_from_the_records(records: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, figure = tmp_path / "speed.md", tmp_path / "speed.png"
    page.write_text("".join(document.read_text() for document in report.DOCUMENTS))
    report.main(records, [page], figure)
    text = page.read_text()
    blocks = text.split("<!-- speed:")[1:]
    assert {block.split(" ")[0] for block in blocks} == set(report.BLOCKS)
    assert all("Not measured" not in block.split("<!-- /")[0] for block in blocks)
    assert f"| {STOCK} |" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    # Drawn again from the same records, nothing changes.
    report.main(records, [page], figure)
    assert page.read_text() == text


def test_no_records_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the benchmark"):
        tables.read(tmp_path / "none.jsonl")


def test_the_full_plan_is_what_the_page_promises() -> None:
    work = speed.plans(quick=False)
    shapes = [(s.d_in, s.d_sae, s.batch) for plan in work for s in plan.shapes]
    assert (768, 12288, 2048) in shapes and (2304, 16384, 4096) in shapes
    widths = [s.d_sae for plan in work if plan.sweep == "d_sae" for s in plan.shapes]
    l0s = [s.l0 for plan in work if plan.sweep == "l0" for s in plan.shapes]
    assert (min(widths), max(widths)) == (4096, 65536)
    assert min(l0s) == 10 and max(l0s) >= 1000


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    shape = Shape(211, 4099, 1021, 17)
    ours, stock = peak_memory(SPARSE, shape), peak_memory(STOCK, shape)
    assert ours is not None and stock is not None
    taken = {name: m["peak_bytes"] - m["before_bytes"] for name, m in
             {"ours": ours, "stock": stock}.items()}  # fmt: skip
    parameters = 4 * 2 * shape.d_in * shape.d_sae
    assert 3 * parameters < taken["ours"] < taken["stock"]


def test_records_are_strict_json(records: Path) -> None:
    for line in records.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("path", ["sparse", "screened"])
def test_the_parts_of_a_pass_are_timed_and_add_up(path: str) -> None:
    trainer = TRAINERS[f"jumprelu-plugin, {path}"](SMALL)
    trainer.step()
    before = {part: getattr(*where) for part, where in passes.PARTS.items()}
    started = time.process_time()
    found = passes.time_parts(trainer.forward_backward)
    whole = time.process_time() - started
    ours = {passes.REST, *passes.PARTS}
    if path == "screened":  # its product is in bfloat16
        ours -= {"encode product, float32"}
    assert set(found) == ours and min(found.values()) >= 0
    assert 0 < sum(found.values()) <= whole
    assert before == {part: getattr(*where) for part, where in passes.PARTS.items()}
