"""`--resume_from_checkpoint auto`: the newest whole checkpoint of the same run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin import FinetuningRunner, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.checkpoints import numbered
from jumprelu_plugin.training.resuming import _identity, resolve_auto
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from jumprelu_plugin.training.trainer import JumpReLUTrainer
from tests.tiny import D_MODEL, tiny_sae
from tests.training.runs import BATCH, assert_same_sae, config, run, steps_logged, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 40


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of use against power cuts alone, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Killed(BaseException):
    """What ends a process, as far as one process can: nothing of ours catches it."""


@contextmanager
def killed_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    show = JumpReLUTrainer._show

    def dies(self: JumpReLUTrainer, *args: Any) -> None:
        if self.n_training_steps >= step:
            raise Killed
        show(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(JumpReLUTrainer, "_show", dies)
        yield


def short(folder: Path, **fields: Any) -> Any:
    return config(folder, training_tokens=STEPS * BATCH, lr_decay_steps=10, **fields)


def train(model: Any, cfg: Any, every_n_minutes: float = 1e-9) -> JumpReLUTrainingRunner:
    """With a checkpoint after every step."""
    return run(
        model, cfg, token_rows(), check_first=False, checkpoint_every_n_minutes=every_n_minutes
    )


@pytest.fixture
def killed(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints of a run that was killed after step 29 of 40."""
    cfg = short(tmp_path)
    with killed_after(30, monkeypatch):
        train(model, cfg)
    folder = Path(cfg.checkpoint_path)
    assert [int(path.name) // BATCH for path in numbered(folder)] == [28, 29]
    return folder


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(model, short(tmp_path_factory.mktemp("whole"), checkpoint_path=None))


def test_auto_goes_on_from_the_newest_and_ends_as_the_uninterrupted_run(
    model: Any, whole: Any, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The run that was never saved has the same weights as the one that was saved at every step.
    cfg = short(tmp_path, resume_from_checkpoint="auto")
    with caplog.at_level("WARNING"):
        resumed = train(model, cfg)
    assert f"resuming from {killed / str(29 * BATCH)}" in caplog.text
    assert cfg.resume_from_checkpoint == "auto"
    assert resumed.cfg.checkpoint_path == str(killed)
    assert_same_sae(resumed, whole)
    assert steps_logged(tmp_path / "output") == list(range(STEPS))
    # What nobody asked to keep is gone with the SAE written.
    assert not killed.exists()


def test_auto_finds_a_run_that_was_started_in_another_directory(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    cfg = short(Path())
    with killed_after(30, monkeypatch):
        train(model, cfg)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    found = resolve_auto(short(Path("../a"), resume_from_checkpoint="auto"))
    assert Path(found.resume_from_checkpoint).name == str(29 * BATCH)
    other = resolve_auto(short(Path(), checkpoint_path="../a/x", resume_from_checkpoint="auto"))
    assert other.resume_from_checkpoint is None  # its output is another folder


def test_auto_takes_the_one_before_a_damaged_one(
    model: Any, whole: Any, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = killed / str(29 * BATCH) / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.write_bytes(content)
    named = short(tmp_path, resume_from_checkpoint=str(weights.parent))
    before = killed / str(28 * BATCH)
    with pytest.raises(ValueError, match=rf"damaged \(sae_weights.*Give {before}, which is whole"):
        train(model, named)
    with caplog.at_level("WARNING"):
        resumed = train(model, short(tmp_path, resume_from_checkpoint="auto"))
    assert f"{weights.parent} is damaged (sae_weights.safetensors does not hold" in caplog.text
    assert f"resuming from {before}" in caplog.text
    assert_same_sae(resumed, whole)


def test_a_config_that_was_changed_in_a_checkpoint_is_damage_not_another_run(
    model: Any, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = (killed / str(steps * BATCH) for steps in (29, 28))
    saved = newest / "runner_cfg.json"
    text = saved.read_text()
    saved.write_text(text.replace('"lr": 0.003', '"lr": 0.007'))
    assert saved.read_text() != text
    with caplog.at_level("WARNING"):
        chosen = resolve_auto(short(tmp_path, resume_from_checkpoint="auto"))
    assert f"{newest} is damaged (runner_cfg.json does not hold" in caplog.text
    assert chosen.resume_from_checkpoint == str(before)


def test_a_field_that_the_run_s_version_did_not_have_tells_no_runs_apart() -> None:
    newer = short(Path("a")).to_dict()
    older = {**newer, "sae": {k: v for k, v in newer["sae"].items() if v is not None}}
    assert older != newer and _identity(older) == _identity(newer)
    changed = {**older, "sae": {**older["sae"], "jumprelu_ste_input_share": 0.3}}
    assert _identity(changed) != _identity(newer)


def test_how_a_schedule_is_written_and_an_end_that_it_does_not_read_tell_no_runs_apart(
    model: Any, killed: Path, tmp_path: Path
) -> None:
    for schedule, resumed in (("constant", True), ("Constant", True), ("cosineannealing", False)):
        cfg = short(tmp_path, lr_end=1e-4, lr_scheduler_name=schedule)
        cfg.resume_from_checkpoint = "auto"
        found = resolve_auto(cfg).resume_from_checkpoint
        assert (found is not None) == resumed


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 1e-3}, "lr=0.003, and this run 0.001"),
        ({"training_tokens": 50 * BATCH}, f"training_tokens={40 * BATCH}, and this run"),
        ({"output_path": "elsewhere"}, "output_path="),
    ],
)
def test_auto_starts_fresh_beside_other_runs_and_says_how_they_differ(
    model: Any,
    killed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    difference: str,
) -> None:
    cfg = config(
        tmp_path,
        **{
            "training_tokens": STEPS * BATCH,
            "lr_decay_steps": 10,
            "resume_from_checkpoint": "auto",
            **changes,
        },
    )
    with caplog.at_level("WARNING"):
        runner = JumpReLUTrainingRunner(cfg, token_rows(), model)
    assert runner.cfg.resume_from_checkpoint is None
    assert difference in caplog.text and "starting fresh" in caplog.text
    assert runner.cfg.checkpoint_path != str(killed)


def test_a_checkpoint_that_is_named_says_what_this_run_changes(
    model: Any, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, last = numbered(killed)
    changed = short(tmp_path / "changed", resume_from_checkpoint=str(last), seed=7)
    same_target = changed.sae.target_l0
    changed.sae.target_l0 = same_target + 2
    with caplog.at_level("WARNING"):
        train(model, changed)
    said = f"sae.target_l0 {same_target!r} ({same_target + 2!r}), seed 42 (7)"
    assert said in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        train(model, short(tmp_path / "same", resume_from_checkpoint=str(last)))
    assert "other settings" not in caplog.text


def test_a_run_shorter_than_its_checkpoint_is_refused(
    model: Any, killed: Path, tmp_path: Path
) -> None:
    _, last = numbered(killed)
    cfg = short(tmp_path / "shorter", resume_from_checkpoint=str(last))
    cfg.training_tokens = 28 * BATCH
    said = rf"has trained on {29 * BATCH:,} tokens and training_tokens is {28 * BATCH:,}"
    with pytest.raises(ValueError, match=said):
        train(model, cfg)
    assert not (tmp_path / "shorter" / "output" / "cfg.json").exists()


def test_auto_without_a_checkpoint_starts_fresh_and_without_a_folder_is_refused(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        train(model, short(tmp_path, resume_from_checkpoint="auto"))
    assert "starting fresh: there is no whole checkpoint of this run below" in caplog.text
    nowhere = short(tmp_path / "b", resume_from_checkpoint="auto", checkpoint_path=None)
    with pytest.raises(ValueError, match="checkpoint_path is None: give one of the two"):
        train(model, nowhere)


def test_checkpoints_that_were_asked_for_stay(model: Any, tmp_path: Path) -> None:
    cfg = short(tmp_path, n_checkpoints=3, save_final_checkpoint=True)
    train(model, cfg)
    names = sorted(path.name for path in Path(cfg.checkpoint_path).iterdir())
    assert names == [*(str(n * BATCH) for n in (11, 21, 31)), f"final_{STEPS * BATCH}"]


def test_a_finetuned_sae_is_resumed_only_as_the_one_it_is_of(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        tiny_sae(d_sae=41, seed=seed).save_model(tmp_path / name)

    def finetune(source: str, **fields: Any) -> FinetuningRunner:
        sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=41, step_kernel="sparse")
        cfg = short(tmp_path, sae=sae, **fields)
        return FinetuningRunner(
            f"{tmp_path}/{source}", cfg, token_rows(), model, checkpoint_every_n_minutes=1e-9
        )

    with killed_after(20, monkeypatch):
        finetune("a").run()
    with caplog.at_level("WARNING"):
        other = finetune("b", resume_from_checkpoint="auto")
    assert other.cfg.resume_from_checkpoint is None
    assert f"has finetuned_from='{tmp_path}/a', and this run '{tmp_path}/b'" in caplog.text
    for spelled in ("a/", f"../{tmp_path.name}/a"):
        resumed = finetune(spelled, resume_from_checkpoint="auto")
        assert resumed.cfg.resume_from_checkpoint is not None
    resumed.run()
    whole = finetune("a", output_path=str(tmp_path / "whole"))
    whole.run()
    assert_same_sae(resumed, whole)


# ---------------------------------------------------------------- places that cannot be written to


def test_an_output_that_cannot_be_written_keeps_the_last_checkpoint(
    model: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = short(tmp_path)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JumpReLUTrainingSAE, "save_inference_model", failing)
        with pytest.raises(OSError, match=r"training is finished.*auto: it goes on from .*/1240"):
            train(model, cfg)
    resumed = train(model, short(tmp_path, resume_from_checkpoint="auto"))
    assert_same_sae(resumed, whole)


@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
def test_a_place_that_cannot_be_a_folder_is_refused_at_once(
    model: Any, tmp_path: Path, field: str
) -> None:
    (tmp_path / "file").write_text("")
    cfg = short(tmp_path, **{field: str(tmp_path / "file" / "below")})
    with pytest.raises(ValueError, match=f"{field} is .*file is not a folder"):
        train(model, cfg)


def test_minutes_below_zero_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every_n_minutes is -1"):
        train(model, short(tmp_path), every_n_minutes=-1)
