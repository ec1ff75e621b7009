"""The other tests of this folder, in a process that never imports the package: the same outcome."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.conftest import WITHOUT, Computed

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(WITHOUT in os.environ, reason="this is that process")


def without_the_plugin(file: Path) -> dict[str, dict[str, Computed]]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE)],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, WITHOUT: str(file)},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kept = torch.load(file, weights_only=True)
    return {
        test: {name: Computed(*value) for name, value in values.items()}
        for test, values in kept.items()
    }


def differences(name: str, found: Any, expected: Any, tolerance: float) -> list[str]:
    """The places where two values differ, with the difference."""
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [f"{name}: {sorted(found.keys() ^ expected.keys())} in one of them"]
        return [
            text
            for key, value in expected.items()
            for text in differences(f"{name}.{key}", found[key], value, tolerance)
        ]
    if not tolerance:
        equal = torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
        return [] if equal else [f"{name}: {found} with the package, {expected} without"]
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        return [f"{name}: {tuple(found.shape)} with the package, {tuple(expected.shape)} without"]
    largest = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return [] if largest <= tolerance else [f"{name}: relative difference {largest:.2e}"]


def test_the_outcome_is_the_same(computed: dict[str, dict[str, Computed]], tmp_path: Path) -> None:
    if not computed:
        pytest.skip("compares what the other tests of this folder computed: run the whole folder")
    expected = without_the_plugin(tmp_path / "computed.pt")
    assert computed.keys() <= expected.keys()
    for test, values in computed.items():
        assert values.keys() == expected[test].keys(), test
        for name, (value, tolerance) in values.items():
            assert differences(name, value, expected[test][name].value, tolerance) == [], test


def test_a_difference_is_found() -> None:
    value = torch.linspace(1, 2, 7)
    other = value.clone()
    other[3] *= 1 + 3e-7  # the last bits
    assert differences("w", value, value.clone(), 0) == []
    assert len(differences("w", other, value, 0)) == 1
    assert differences("w", other, value, 1e-6) == []
    assert len(differences("w", other, value, 1e-8)) == 1
    assert len(differences("w", {"a": 1, "b": [2]}, {"a": 1, "b": [3]}, 0)) == 1
    assert len(differences("w", {"a": 1}, {"a": 1, "b": [3]}, 0)) == 1
    assert len(differences("w", value[:5], value, 1e-6)) == 1
