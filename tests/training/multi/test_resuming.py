"""Runs over several dictionaries that were stopped, killed or diverged, and go on."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training._interruption import InterruptedException

from jumprelu_plugin import JumpReLUMultiTrainingRunner
from jumprelu_plugin.training.checkpoints import numbered
from jumprelu_plugin.training.multi.trainer import MultiTrainer
from tests.tiny import MLP, RESIDUAL
from tests.training.multi.runs import STEPS, dictionaries, of, train, weights
from tests.training.runs import BATCH, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put a step's number in the list: after it, the process is sent SIGINT, as by Ctrl-C."""
    steps: list[int] = []
    update = MultiTrainer._update_pbar

    def wrapped(self: MultiTrainer, *args: Any, **kwargs: Any) -> None:
        if self.n_training_steps in steps:
            signal.raise_signal(signal.SIGINT)
        update(self, *args, **kwargs)

    monkeypatch.setattr(MultiTrainer, "_update_pbar", wrapped)
    yield steps


def test_stopped_and_resumed_it_is_the_uninterrupted_run(
    model: Any,
    whole: Path,
    stop_at: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def again() -> dict[str, Any]:
        return dictionaries(tmp_path, resume_from_checkpoint="auto")

    for step in (6, 17):
        stop_at[:] = [step]
        with pytest.raises(InterruptedException, match="resume_from_checkpoint auto goes on"):
            train(model, again())
        assert not (tmp_path / "output" / "low").exists()
    stop_at.clear()
    with caplog.at_level("WARNING"):
        resumed = train(model, again())
    assert f"/{17 * BATCH}, of {STEPS * BATCH:,} tokens" in caplog.text
    expected, found = weights(whole), weights(tmp_path / "output")
    assert found.keys() == expected.keys() and len(found) == 3 * 5
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not Path(resumed.cfg.checkpoint_path or "").exists()


def test_checkpoints_that_were_asked_for_stay_and_can_be_named(
    model: Any, whole: Path, tmp_path: Path
) -> None:
    runner = train(model, dictionaries(tmp_path / "first", n_checkpoints=3))
    kept = numbered(Path(runner.cfg.checkpoint_path or ""))
    assert [int(path.name) // BATCH for path in kept] == [6, 12, 18]
    named = dictionaries(tmp_path / "second", resume_from_checkpoint=str(kept[1]))
    train(model, named)
    for name, value in weights(whole).items():
        assert torch.equal(weights(tmp_path / "second" / "output")[name], value), name
    wider = {"low": of(tmp_path / "third", d_sae=43, resume_from_checkpoint=str(kept[1]))}
    with pytest.raises(ValueError, match="has d_sae 41 and this run 43"):
        train(model, wider)
    other = {"lower": of(tmp_path / "third", resume_from_checkpoint=str(kept[1]))}
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint.*lower/cfg\.json"):
        train(model, other)


def test_resumed_with_other_schedules_each_follows_its_own(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = train(model, dictionaries(tmp_path / "first", n_checkpoints=1))
    (checkpoint,) = numbered(Path(runner.cfg.checkpoint_path or ""))

    def longer(folder: Path, **fields: Any) -> dict[str, Any]:
        # Its decay begins later; "high" has a rate of its own beside that.
        made = dictionaries(folder, **fields)
        for cfg in made.values():
            cfg.training_tokens = cfg.training_tokens + 11 * BATCH
        made["high"].lr = 7e-4
        return made

    train(model, longer(tmp_path / "whole"))
    with caplog.at_level("WARNING"):
        train(model, longer(tmp_path / "second", resume_from_checkpoint=str(checkpoint)))
    assert "high: the checkpoint's learning rates are of another config" in caplog.text
    rates = [
        {
            (line["step"], name): line[name]["details/current_learning_rate"]
            for line in map(json.loads, (folder / "output" / "metrics.jsonl").open())
            for name in ("low", "high", "mlp")
        }
        for folder in (tmp_path / "whole", tmp_path / "second")
    ]
    whole, resumed = rates
    assert len(resumed) == 3 * (STEPS + 11 - int(checkpoint.name) // BATCH)
    assert resumed == {at: whole[at] for at in resumed}


def test_auto_does_not_resume_a_run_of_other_dictionaries(
    model: Any, stop_at: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop_at[:] = [5]
    with pytest.raises(InterruptedException):
        train(model, dictionaries(tmp_path))
    other = dictionaries(tmp_path, resume_from_checkpoint="auto")
    other["mlp"].sae.target_l0 = 9
    with caplog.at_level("WARNING"):
        runner = JumpReLUMultiTrainingRunner(other, token_rows(), model)
    assert runner.cfg.resume_from_checkpoint is None
    assert "has saes.mlp.target_l0=7, and this run 9" in caplog.text


def test_the_dictionary_that_diverges_is_named_and_the_others_can_go_on(
    model: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = dictionaries(tmp_path / "first", n_checkpoints=3)
    update = MultiTrainer._update_pbar

    def diverges(self: MultiTrainer, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        if self.n_training_steps == 14:
            self.saes["high"].W_enc.data.fill_(float("inf"))

    with monkeypatch.context() as patch:
        patch.setattr(MultiTrainer, "_update_pbar", diverges)
        said = "^high: .*The others can go on without it.* give --resume_from_checkpoint (.*)$"
        with pytest.raises(ValueError, match=said) as raised:
            train(model, configs)
    last = str(raised.value).rpartition(" ")[2]
    assert Path(last).name == str(12 * BATCH)
    left = dictionaries(tmp_path / "second", resume_from_checkpoint=last)
    del left["high"]
    train(model, left)
    found = weights(tmp_path / "second" / "output")
    assert len(found) == 2 * 5
    for name, value in found.items():
        assert torch.equal(value, weights(whole)[name]), name
    without_a_hook = dictionaries(tmp_path / "third", resume_from_checkpoint=last)
    del without_a_hook["mlp"]
    with pytest.raises(ValueError, match="has hook_names .*and this run"):
        train(model, without_a_hook)


def test_a_run_that_was_killed_while_it_moved_its_result_goes_on(
    model: Any, whole: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "output" / "low"
    moved.mkdir(parents=True)
    (moved / "stale").write_text("")
    with pytest.raises(ValueError, match="already holds low"):
        train(model, dictionaries(tmp_path))
    (tmp_path / "output" / ".unfinished" / "high").mkdir(parents=True)
    train(model, dictionaries(tmp_path))
    assert not (moved / "stale").exists()
    assert weights(tmp_path / "output").keys() == weights(whole).keys()


def test_a_checkpoint_of_other_hooks_is_refused(model: Any, tmp_path: Path) -> None:
    made = dictionaries(tmp_path, n_checkpoints=1)
    train(model, made)
    (checkpoint,) = Path(made["low"].checkpoint_path or "").iterdir()
    given = {"resume_from_checkpoint": str(checkpoint)}
    others = dictionaries(tmp_path / "other", **given)
    others["high"].hook_name = MLP
    with pytest.raises(ValueError, match=f"hook_names .*{RESIDUAL}.*and this run .*'high': '{MLP}"):
        train(model, others)
    assert not (tmp_path / "other").exists()
