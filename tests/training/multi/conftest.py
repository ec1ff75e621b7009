"""What the tests of runs over several dictionaries share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.training.multi.runs import dictionaries, train


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of use against power cuts alone, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def whole(
    model: Any, tmp_path_factory: pytest.TempPathFactory, one_thread_throughout: None
) -> Path:
    """The output folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(model, dictionaries(folder, checkpoint_path=None))
    return folder / "output"
