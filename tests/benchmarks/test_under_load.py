"""The benchmark of a busy core measures every case under both conditions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # imports SAELens in three processes


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_every_case_is_measured_undisturbed_and_not(tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "benchmarks.under_load", "--quick", "--output", str(output)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = list(map(json.loads, output.read_text().splitlines()))
    cases = {(r["spins"], r["busy_core"]) for r in records}
    assert cases == {(s, b) for s in ("adapted", "libgomp's own") for b in (False, True)}
    for found in records:
        assert min(found["tokens_per_second"]) > 0
        assert set(found["path"]) <= {"sparse", "screened", "dense"}
    assert "undisturbed" in done.stdout and "one core busy" in done.stdout
