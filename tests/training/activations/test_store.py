"""The buffer and the store of activations give what SAELens' own give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer

from jumprelu_plugin.training.activations.store import MixingBuffer, resumable
from tests.training.runs import config, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.7, 1.0])
def test_the_buffer_gives_what_saelens_buffer_gives(fraction: float) -> None:
    def source() -> Any:
        generator = torch.Generator().manual_seed(3)
        for rows in [53, 7, 0, 101, 19, 211] * 9:
            yield torch.randn(rows, 3, generator=generator)

    torch.manual_seed(11)
    theirs = list(mixing_buffer(97, 13, source(), fraction))
    torch.manual_seed(11)
    ours = []
    with pytest.raises(StopIteration):  # theirs also empties the buffer; a model never ends
        buffer = MixingBuffer(97, 13, source(), fraction)
        while True:
            ours.append(next(buffer))
    assert len(ours) > 20
    for mine, wanted in zip(ours, theirs, strict=False):
        assert torch.equal(mine, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_batches_for_a_gpu_are_those_of_the_host(fraction: float) -> None:
    def source() -> Any:
        generator = torch.Generator().manual_seed(3)
        while True:
            yield torch.randn(53, 7, generator=generator)

    torch.manual_seed(11)
    plain = MixingBuffer(197, 13, source(), fraction)
    expected = [next(plain) for _ in range(60)]
    torch.manual_seed(11)
    buffer = MixingBuffer(197, 13, source(), fraction, torch.device("cuda"))
    found = [next(buffer) for _ in range(60)]
    assert buffer.serving is not None and buffer.serving.is_pinned()
    assert all(batch.device.type == "cuda" for batch in found)
    for batch, wanted in zip(found, expected, strict=True):
        assert torch.equal(batch.cpu(), wanted)


def test_the_store_gives_what_saelens_store_gives(model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    theirs = ActivationsStore.from_config(model, cfg, override_dataset=token_rows())
    ours = resumable(theirs, cfg)
    torch.manual_seed(5)
    batches = [next(theirs) for _ in range(70)]
    torch.manual_seed(5)
    assert all(torch.equal(next(ours), batch) for batch in batches)


@pytest.mark.parametrize(
    ("size", "fraction", "message"),
    [(12, 0.5, "holds 12 rows.*takes 13.*n_batches_in_buffer"), (50, 1.2, "1.2; expected 0 to 1")],
)
def test_a_buffer_that_cannot_work_is_refused(size: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixingBuffer(size, 13, iter(()), fraction)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2, 5, 7], "row 3 of the tokenized text has 3 tokens, fewer than context_size 13"),
        ([2, *[5] * 11, 99], "row 3 of the tokenized text holds tokens 2 to 99.*another model"),
        ([2, *[5] * 11, -1], "row 3 of the tokenized text holds tokens -1 to 5.*another model"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    row: list[int], message: str, model: Any, tmp_path: Path
) -> None:
    cfg = config(tmp_path)
    rows = Dataset.from_dict({"tokens": [[2, *range(4, 16)]] * 3 + [row] + [[2, *[5] * 12]] * 40})
    store = resumable(ActivationsStore.from_config(model, cfg, override_dataset=rows), cfg)
    with pytest.raises(ValueError, match=message):
        next(store)


@pytest.mark.parametrize("row", [None, ""])
def test_a_row_without_text_is_named(row: str | None, model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    rows = Dataset.from_dict({"text": ["The people of the sea. "] * 3 + [row] + ["More. "] * 400})
    store = resumable(ActivationsStore.from_config(model, cfg, override_dataset=rows), cfg)
    if row is None:
        with pytest.raises(ValueError, match="row 3 of the text holds None in its column 'text'"):
            next(store)
    else:
        assert len(next(store))
