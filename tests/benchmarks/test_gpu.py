"""The GPU's check runs at tiny sizes on a CPU, and the page is drawn from what it records."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu import AT_SHAPES, DICTIONARIES, IN_SWEEP, PRODUCTS
from benchmarks.gpu_clt import STEP_KERNELS
from benchmarks.tables import read
from benchmarks.trainers import SPARSIFY, STOCK, TRITON
from jumprelu_plugin.records import append_jsonl

ROOT = Path(__file__).parents[2]


def record(part: str, **more: object) -> dict[str, object]:
    sizes = {"d_in": 29, "d_sae": 211, "batch": 53, "l0": 7.0}
    origin = {"git": {"commit": "0123456789abcdef"}, "versions": {"torch": "2.13.0"}}
    return {"part": part, **sizes, "device_name": "A GPU", "provenance": origin, **more}


def test_without_records_the_page_says_so(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(gpu_report.DOCUMENT.read_text())
    gpu_report.main(tmp_path / "none.jsonl", page, tmp_path / "gpu.png")
    assert page.read_text().count(gpu_report.NOT_MEASURED) == len(gpu_report.BLOCKS)
    assert not (tmp_path / "gpu.png").exists()


def test_the_page_is_drawn_from_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, path = tmp_path / "results.md", tmp_path / "gpu.jsonl"
    page.write_text(gpu_report.DOCUMENT.read_text())
    times = {STOCK: 0.021, TRITON: 0.003, "one product, float32": 0.006}
    for name, took in times.items():
        append_jsonl(path, record("shapes", trainer=name, median_seconds=took, peak_bytes=2e9))
    append_jsonl(path, record("shapes", trainer=SPARSIFY, error="ImportError: no module"))
    append_jsonl(path, record("l0", trainer=TRITON, median_seconds=0.003))
    append_jsonl(path, record("harvest", dictionaries=4, tokens_per_second=31e3))
    spent = {"_screen_kernel": 0.51}
    append_jsonl(
        path, record("profile", trainer=TRITON, kernel_milliseconds=spent, all_milliseconds=2.7)
    )
    clt = {"layers": 3, "tokens_per_second": 7e3, "peak_bytes": 3e9, "median_seconds": 0.013}
    append_jsonl(path, record("clt", trainer="train-clt, triton", **clt))
    gpu_report.main(path, page, tmp_path / "gpu.png")
    text = page.read_text()
    assert "| train-clt, triton | 13.0 | 7,000 | 3.0 |" in text and "3 layers, d_in 29" in text
    assert "Measured on A GPU at commit 0123456789" in text and "| 4 | 31,000 |" in text
    assert f"| {TRITON} | 3.00 | 7.0 | 17,667 |" in text and "_screen_kernel" in text
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


@pytest.mark.kernels
def test_the_script_runs_at_tiny_sizes_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    done = subprocess.run(
        [ROOT / "tools/gpu_check.sh", "--device", "cpu", "--small", "--records", path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = read(path)
    steps = [r for r in records if r["part"] == "shapes"]
    assert {r["trainer"] for r in steps} == {*PRODUCTS, *AT_SHAPES}
    failed = {r["trainer"]: r["error"] for r in records if "error" in r}
    assert set(failed) <= {SPARSIFY}, failed  # which need not be installed
    assert {r["trainer"] for r in records if r["part"] == "l0"} == set(IN_SWEEP)
    assert [r["dictionaries"] for r in records if r["part"] == "harvest"] == list(DICTIONARIES)
    assert len([r for r in records if r["part"] == "clt"]) == len(STEP_KERNELS)
    assert any("kernel_milliseconds" in r for r in records)
    assert all(r["device_name"] == "cpu" and r["provenance"]["versions"] for r in records)
