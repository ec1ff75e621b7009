"""Held-out text beside an activation cache: nothing that was trained on is among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.sequences import held_out_beside, read_sequences
from tests.tiny import VOCABULARY, tiny_models

CONTEXT, ROWS, HELD_OUT, TRAINED_ON = 7, 43, 11, 19


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_models(tmp_path_factory.mktemp("model")).hooked


def text(folder: Path, **splits: int) -> str:
    """A dataset of tokenized rows, every token of which occurs in one row alone."""
    generator = torch.Generator().manual_seed(3)
    rows = {
        split: Dataset.from_dict(
            {"tokens": torch.randint(5, VOCABULARY, (count, CONTEXT), generator=generator)}
        )
        for split, count in splits.items()
    }
    DatasetDict(rows).save_to_disk(folder)
    return str(folder)


def beside(model: Any, path: str, trained_on: Tensor) -> Tensor:
    return held_out_beside(
        model,
        path,
        digest(trained_on),
        len(trained_on),
        context_size=CONTEXT,
        held_out=HELD_OUT,
    )


def all_rows(model: Any, path: str) -> Tensor:
    return read_sequences(model, path, context_size=CONTEXT, held_out=0, train=ROWS)[0]


def test_a_split_for_evaluation_is_read(model: Any, tmp_path: Path) -> None:
    path = text(tmp_path / "text", train=ROWS, validation=HELD_OUT + 2)
    found = beside(model, path, all_rows(model, path)[:TRAINED_ON])
    assert torch.equal(
        found, read_sequences(model, path, context_size=CONTEXT, held_out=HELD_OUT)[1]
    )


@pytest.mark.parametrize(
    ("trained_on", "held_out"),
    [
        (
            slice(TRAINED_ON),
            slice(TRAINED_ON, TRAINED_ON + HELD_OUT),
        ),  # as `jumprelu cache-activations` reads
        (slice(HELD_OUT, HELD_OUT + TRAINED_ON), slice(HELD_OUT)),
        (slice(ROWS - 3), slice(ROWS - 3, ROWS)),
    ],
)
def test_what_was_trained_on_is_left_out(
    trained_on: slice, held_out: slice, model: Any, tmp_path: Path
) -> None:
    path = text(tmp_path / "text", train=ROWS)
    rows = all_rows(model, path)
    assert torch.equal(beside(model, path, rows[trained_on]), rows[held_out])


def test_what_cannot_be_told_apart_is_refused(model: Any, tmp_path: Path) -> None:
    path = text(tmp_path / "text", train=ROWS)
    rows = all_rows(model, path)
    with pytest.raises(ValueError, match="first 19 sequences are not those that were trained on"):
        beside(model, path, rows[1 : TRAINED_ON + 1])
    with pytest.raises(ValueError, match="all 43 sequences .* none is left to evaluate on"):
        beside(model, path, rows)
