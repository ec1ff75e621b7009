"""Activations drawn ahead by a thread: the same batches, the same state, the same run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from jumprelu_plugin.training.activations.read_ahead import (
    PausingEvaluator,
    ReadAhead,
    passes_ahead,
)
from jumprelu_plugin.training.activations.store import ResumableActivationsStore, resumable
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.training.runs import config, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = 40


@pytest.fixture
def stores(model: Any, tmp_path: Path) -> Iterator[Any]:
    """Makes stores that read so many passes ahead, over several epochs of a short text."""
    made: list[ResumableActivationsStore] = []

    def store(ahead: int) -> ResumableActivationsStore:
        runner = JumpReLUTrainingRunner(config(tmp_path), token_rows(), model, check_first=False)
        found = resumable(runner.activations_store, runner.cfg)
        found.ahead = ahead
        made.append(found)
        return found

    yield store
    for each in made:
        each.stop_reading()


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_and_state_are_those_without_it(stores: Any, ahead: int) -> None:
    plain, reading = stores(0), stores(ahead)
    seen = []
    for store in (plain, reading):
        torch.manual_seed(5)
        seen.append([(next(store), store.state_dict()) for _ in range(BATCHES)])
    for (rows, state), (found, found_state) in zip(*seen, strict=True):
        assert torch.equal(found, rows)
        assert found_state.keys() == state.keys()
        assert all(torch.equal(found_state[name], value) for name, value in state.items())
    processed = {int(state["n_dataset_processed"]) for _, state in seen[0]}
    assert len(processed) > 3  # it read on meanwhile


def test_it_goes_on_from_any_state(stores: Any, tmp_path: Path) -> None:
    plain, state = stores(0), str(tmp_path / "state.safetensors")
    torch.manual_seed(5)
    expected = [next(plain) for _ in range(BATCHES)]
    for place in (1, 7, 23):
        first, second = stores(2), stores(3)  # one model: their threads take turns
        torch.manual_seed(5)
        for _ in range(place):
            next(first)
        first.save(state)
        first.stop_reading()
        next(second)  # its thread is somewhere else in the text
        second.load(state)
        for rows in expected[place:]:
            assert torch.equal(next(second), rows)
        second.stop_reading()


def test_an_evaluation_moves_nothing_and_has_the_model_to_itself(
    model: Any, stores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, reading = stores(0), stores(2)
    torch.manual_seed(5)
    expected = [next(plain) for _ in range(BATCHES)]
    beginning = stores(0).get_batch_tokens(7)
    users: set[int] = set()
    run = type(model).forward

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        users.add(threading.get_ident())
        return run(self, *args, **keywords)

    monkeypatch.setattr(type(model), "forward", forward)

    class Evaluator:
        activations_store: Any = None
        found: list[torch.Tensor] = []

        def __call__(self, name: str, *, scaler: Any) -> str:
            users.clear()
            tokens = self.activations_store.get_batch_tokens(7)
            model(tokens)
            self.found.append(tokens)
            assert users == {threading.get_ident()}
            return name

    evaluator = Evaluator()
    pausing = PausingEvaluator(evaluator, reading)
    torch.manual_seed(5)
    for index, rows in enumerate(expected):
        assert torch.equal(next(reading), rows)
        if index in (3, 19):
            assert pausing("evaluated", scaler=ActivationScaler()) == "evaluated"
    first, second = evaluator.found
    assert not torch.equal(first, second)
    assert torch.equal(first, beginning)


def test_an_error_in_the_thread_is_raised_after_what_came_before() -> None:
    def source() -> Iterator[torch.Tensor]:
        yield torch.tensor(3.0)
        yield torch.tensor(5.0)
        raise ValueError("activations hold NaN")

    before = threading.active_count()
    reader = ReadAhead(source(), dict, 4)
    assert [float(next(reader)), float(next(reader))] == [3.0, 5.0]
    with pytest.raises(ValueError, match="hold NaN"):
        next(reader)
    reader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("asked", "model_device", "buffer_device", "expected"),
    [
        (False, None, "cuda", 0),
        (False, "cuda", "cuda", 0),
        (False, "cuda:0", "cuda:0", 0),
        (False, "cpu", "cuda", 4),  # 44 · (1 - 0.75) sequences, 3 a pass
        (False, "cuda:1", "cuda", 4),
        (False, "cuda", "cpu", 4),
        (True, "cuda", "cuda", 1),
        (5, "cpu", "cpu", 5),
    ],
)
def test_it_is_on_by_default_where_devices_differ(
    asked: bool | int, model_device: str | None, buffer_device: str, expected: int
) -> None:
    cfg = SimpleNamespace(
        prefetch_llm_batches=asked,
        device="cuda",
        llm_device=model_device,
        act_store_device=buffer_device,
        n_batches_in_buffer=44,
        activations_mixing_fraction=0.75,
        store_batch_size_prompts=3,
    )
    assert passes_ahead(cfg) == expected
