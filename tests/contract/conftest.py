"""Registers the package, or does not, and compares what the tests compute with and without it."""

from __future__ import annotations

import copy
import fcntl
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import single_thread
from tests.contract.compared import differences

# Set in the process that must not import the package; names the file of what was computed there.
WITHOUT = "JUMPRELU_CONTRACT_WITHOUT"
HERE = Path(__file__).parent

_computed: dict[str, dict[str, Any]] = {}

if WITHOUT not in os.environ:
    importlib.import_module("jumprelu_plugin")


@pytest.fixture(autouse=True)
def one_order_of_sums() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="session")
def without(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, dict[str, Any]] | None:
    """By test and name, what a process computed that never imported the package.

    It runs once, for all workers of pytest-xdist. None in that process itself.
    """
    if WITHOUT in os.environ:
        return None
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    file = shared / "contract_without_the_package.pt"
    with open(shared / "contract.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _run_without(file, pytestconfig.getoption("--perturb"))
    return torch.load(file, weights_only=True)


def _run_without(file: Path, perturbation: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE)),
            *(() if perturbation is None else ("--perturb", perturbation)),
        ],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**environment, WITHOUT: str(file)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


class Outcome:
    """What one test computes, each value compared with that of the process without the package."""

    def __init__(self, test: str, without: dict[str, dict[str, Any]] | None):
        self._kept = _computed.setdefault(test, {})
        self._expected = None if without is None else without[test]

    def same(self, name: str, value: Any) -> None:
        """A value that is the same, bit for bit, without the package."""
        self.close(name, value, 0.0)

    def close(self, name: str, value: Any, tolerance: float) -> None:
        """A value whose relative difference without the package is at most `tolerance`."""
        if self._expected is None:
            self._kept[name] = _copied(value)
        else:
            assert differences(name, value, self._expected[name], tolerance) == []


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return copy.copy(value)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, without: dict[str, dict[str, Any]] | None) -> Outcome:
    return Outcome(f"{Path(request.node.path).name}::{request.node.name}", without)


def pytest_sessionfinish() -> None:
    if WITHOUT in os.environ:
        assert "jumprelu_plugin" not in sys.modules
        torch.save(_computed, os.environ[WITHOUT])
