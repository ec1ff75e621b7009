"""Registers the package, or does not, and keeps what the tests computed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import single_thread

# Set in a process that must not import the package; names the file of what was computed there.
WITHOUT = "JUMPRELU_CONTRACT_WITHOUT"


class Computed(NamedTuple):
    """A value that a test computed.

    Attributes:
        value: numbers, text, lists, dicts or tensors.
        tolerance: the largest relative difference allowed; 0 means the same bits.
    """

    value: Any
    tolerance: float


_computed: dict[str, dict[str, Computed]] = {}

if WITHOUT not in os.environ:
    importlib.import_module("jumprelu_plugin")


@pytest.fixture(autouse=True)
def one_order_of_sums() -> Iterator[None]:
    with single_thread():
        yield


class Outcome:
    """What one test computed, by name."""

    def __init__(self, test: str):
        self._kept = _computed.setdefault(test, {})
        self._kept.clear()

    def same(self, name: str, value: Any) -> None:
        """Keep a value that is the same, bit for bit, without the package."""
        self._kept[name] = Computed(_copied(value), 0.0)

    def close(self, name: str, value: Any, tolerance: float) -> None:
        """Keep a value whose relative difference without the package is at most `tolerance`."""
        self._kept[name] = Computed(_copied(value), tolerance)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Outcome:
    return Outcome(f"{Path(request.node.path).name}::{request.node.name}")


@pytest.fixture
def computed() -> dict[str, dict[str, Computed]]:
    """What this process's tests computed so far."""
    return _computed


def pytest_sessionfinish() -> None:
    if WITHOUT in os.environ:
        assert "jumprelu_plugin" not in sys.modules
        plain = {test: {n: tuple(c) for n, c in kept.items()} for test, kept in _computed.items()}
        torch.save(plain, os.environ[WITHOUT])
