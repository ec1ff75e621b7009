"""The benchmark that kills runs: some trials of each kind end as the uninterrupted run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import read


@pytest.mark.slow
def test_killed_and_damaged_runs_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    flags = {"kills": 4, "layer-kills": 2, "fresh-kills": 1, "damages": 6, "output": output}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.durability", "--no-disks", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(output)
    assert len(records) == 4 + 2 * 2 + 1 + 6 + 2 * 2 + 1
    trials = [record for record in records if "equal" in record]
    assert all(record["equal"] for record in trials)
    kills = [record for record in trials if record["test"] == "kill"]
    assert all(r["unfinished"] for r in kills if r["moment"] == "writing")
    assert any(r["resumed"] for r in kills)
    damages = [record for record in trials if record["test"] == "damage"]
    assert all(r["found"] and r["used_the_one_before"] for r in damages)
