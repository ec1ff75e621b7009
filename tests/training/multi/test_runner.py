"""Several dictionaries in one pass over the text against a run of each alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file

from jumprelu_plugin import JumpReLUMultiTrainingRunner, JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.checkpoints import numbered
from jumprelu_plugin.training.multi.trainer import MultiTrainer
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.tiny import (
    D_MODEL,
    HEADS,
    MLP,
    RESIDUAL,
    WIDTH,
    tiny_hf,
    tiny_hooked,
    tiny_tokenizer,
)
from tests.training.runs import BATCH, config, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, D_SAE = 23, 41


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of use against power cuts alone, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def of(folder: Path, hook: str = RESIDUAL, *, sae: Any = None, **fields: Any) -> Any:
    """The config of one dictionary's own run."""
    given = {"d_in": WIDTH[hook], "d_sae": D_SAE, "target_l0": 7, "step_kernel": "sparse"}
    given |= {name: fields.pop(name) for name in ("target_l0", "d_sae") if name in fields}
    return config(
        folder,
        sae=JumpReLUTrainingSAEConfig(**given) if sae is None else sae,
        hook_name=hook,
        training_tokens=STEPS * BATCH,
        lr_decay_steps=7,
        **fields,
    )


def dictionaries(folder: Path, **fields: Any) -> dict[str, Any]:
    return {
        "low": of(folder, target_l0=5, **fields),
        "high": of(folder, target_l0=11, **{"lr": 1e-3, **fields}),
        "mlp": of(folder, MLP, **fields),
    }


def train(model: Any, configs: dict[str, Any], **options: Any) -> JumpReLUMultiTrainingRunner:
    options = {"check_first": False, **options}
    runner = JumpReLUMultiTrainingRunner(configs, token_rows(), model, **options)
    runner.run()
    return runner


def weights(folder: Path) -> dict[str, Any]:
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted(folder.glob("*/sae_weights.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def whole(
    model: Any, tmp_path_factory: pytest.TempPathFactory, one_thread_throughout: None
) -> Path:
    """The output folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(model, dictionaries(folder, checkpoint_path=None))
    return folder / "output"


def test_each_is_what_its_own_run_trains_bit_for_bit(
    model: Any, whole: Path, tmp_path: Path
) -> None:
    for name in ("low", "high", "mlp"):
        alone = dictionaries(tmp_path / name)[name]
        JumpReLUTrainingRunner(alone, token_rows(), model, check_first=False).run()
        expected = load_file(tmp_path / name / "output" / "sae_weights.safetensors")
        found = load_file(whole / name / "sae_weights.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (name, key)
    low, high = (load_file(whole / name / "sae_weights.safetensors") for name in ("low", "high"))
    assert not torch.equal(low["threshold"], high["threshold"])


def test_a_model_in_bfloat16_gives_each_the_rows_of_its_own_run(
    tmp_path: Path,
) -> None:
    half = tiny_hooked(tiny_hf(), tiny_tokenizer(tmp_path / "tokenizer")).to(torch.bfloat16)
    train(half, {"low": dictionaries(tmp_path / "many", checkpoint_path=None)["low"]})
    alone = dictionaries(tmp_path / "alone", checkpoint_path=None)["low"]
    JumpReLUTrainingRunner(alone, token_rows(), half, check_first=False).run()
    expected = load_file(tmp_path / "alone" / "output" / "sae_weights.safetensors")
    for name, value in load_file(
        tmp_path / "many" / "output" / "low" / "sae_weights.safetensors"
    ).items():
        assert torch.equal(value, expected[name]), name


def test_reading_ahead_changes_nothing(model: Any, whole: Path, tmp_path: Path) -> None:
    made = dictionaries(tmp_path, prefetch_llm_batches=2, n_checkpoints=1)
    train(model, made)
    (checkpoint,) = Path(made["low"].checkpoint_path or "").iterdir()
    resumed = tmp_path / "resumed"
    given = {"prefetch_llm_batches": True, "resume_from_checkpoint": str(checkpoint)}
    train(model, dictionaries(resumed, **given))
    expected = weights(whole)
    for folder in (tmp_path, resumed):
        found = weights(folder / "output")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_folders_are_stock_ones_and_the_record_names_them(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    files = ["dictionaries.json", "metrics.jsonl", "runner_cfg.json"]
    assert names == sorted(["low", "high", "mlp", *files])
    saved = SAE.load_from_disk(whole / "mlp")
    assert (saved.cfg.architecture(), saved.cfg.metadata.hook_name) == ("jumprelu", MLP)
    assert saved.cfg.metadata.context_size == 13
    record = json.loads((whole / "dictionaries.json").read_text())
    low, high, mlp = record["dictionaries"]
    assert [each["folder"] for each in (low, high, mlp)] == ["low", "high", "mlp"]
    assert (low["target_l0"], high["target_l0"], high["lr"]) == (5, 11, 1e-3)
    assert mlp["hook_name"] == MLP and mlp["l0_in_training"] == saved.cfg.metadata.l0
    stored = json.loads((whole / "runner_cfg.json").read_text())
    assert stored["output_path"] == str(whole) and stored["dictionaries"]["high"]["lr"] == 1e-3
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert set(lines[-1]) == {"step", "low", "high", "mlp"}


def test_the_model_runs_as_often_as_for_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    harvest = model.run_with_cache

    def counted(tokens: Any, **options: Any) -> Any:
        passes.append(len(tokens))
        return harvest(tokens, **options)

    monkeypatch.setattr(model, "run_with_cache", counted)
    one = {"low": of(tmp_path / "one")}
    train(model, one)
    alone = len(passes)
    train(model, dictionaries(tmp_path / "three"))
    assert alone > 3 and len(passes) == 2 * alone


# ---------------------------------------------------------------- stopped and resumed


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


# ---------------------------------------------------------------- what differs, what may not


def test_a_scale_of_the_input_is_estimated_for_those_that_need_one(
    model: Any, tmp_path: Path
) -> None:
    """As SAELens estimates it, from the same batches; and other architectures train beside."""
    stock = TopKTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, k=7, normalize_activations="expected_average_only_in"
    )
    both = {"topk": of(tmp_path / "both", sae=stock), "jumprelu": of(tmp_path / "both")}
    train(model, both)
    alone = of(tmp_path / "alone", sae=stock)
    JumpReLUTrainingRunner(alone, token_rows(), model, check_first=False).run()
    expected = load_file(tmp_path / "alone" / "output" / "sae_weights.safetensors")
    found = load_file(tmp_path / "both" / "output" / "topk" / "sae_weights.safetensors")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_check_looks_at_each_and_refuses_what_cannot_work(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configs = dictionaries(tmp_path, lr_warm_up_steps=40)
    runner = JumpReLUMultiTrainingRunner(configs, token_rows(), model)
    check = runner.check()
    found = check.dictionaries
    assert list(found) == ["low", "high", "mlp"] and found["high"].lr == 1e-3
    assert all(each.of("repaired") and each.memory is None for each in found.values())
    assert [name for name, _ in check.of("repaired")] == ["low", "high", "mlp"]
    assert str(check).startswith("peak memory: ") and "on cpu" in str(check)
    narrow = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, l0_coefficient=1.0, jumprelu_bandwidth=1e-7,
        step_kernel="sparse",
    )  # fmt: skip
    bad = {"low": of(tmp_path), "narrow": of(tmp_path, sae=narrow)}
    with pytest.raises(ValueError, match="narrow: a threshold gets a gradient from"):
        train(model, bad, check_first=True)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_size": 11}, "context_size is 11 for mlp and 13 for low"),
        ({"compile_sae": True}, "compile_sae is True"),
        ({"hook_name": "blocks.1.hook_mlp_uot"}, "mlp: the model has no hook.*hook_mlp_out"),
        ({"hook_name": HEADS}, "mlp: the SAE's d_in is 33.*30 wide"),
        ({"prefetch_llm_batches": True}, "prefetch_llm_batches is True for mlp"),
        ({"lr_scheduler_name": "linear"}, "lr_scheduler_name is 'linear'"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    model: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    configs = dictionaries(tmp_path)
    for name, value in changes.items():
        setattr(configs["mlp"], name, value)
    with pytest.raises(ValueError, match=message):
        train(model, configs)
    assert not (tmp_path / "output").exists()


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


def test_relative_folders(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(model, dictionaries(Path(), n_checkpoints=1))
    assert (tmp_path / "output" / "mlp" / "cfg.json").is_file()
    assert list((tmp_path / "checkpoints").glob("*/*/checkpoint_manifest.json"))


def test_an_argument_that_the_model_does_not_take_is_refused(model: Any, tmp_path: Path) -> None:
    configs = dictionaries(tmp_path)
    for cfg in configs.values():
        cfg.model_kwargs = {"foo": 1}
    with pytest.raises(ValueError, match="model_kwargs is .*unexpected keyword argument 'foo'"):
        train(model, configs)


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


def test_names_and_folders_are_refused(model: Any, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no dictionary"):
        train(model, {})
    with pytest.raises(ValueError, match="name is '../x'"):
        train(model, {"../x": of(tmp_path)})
    with pytest.raises(ValueError, match="name is 'metrics.jsonl'.*beside the run's own files"):
        train(model, {"metrics.jsonl": of(tmp_path)})
    with pytest.raises(ValueError, match="already holds dictionaries.json"):
        train(model, {"a": of(tmp_path, output_path=str(whole))})
    heads = {"a": of(tmp_path, HEADS), "b": of(tmp_path, HEADS, hook_head_index=2)}
    with pytest.raises(ValueError, match="hook_head_index is 2 for b, and None for another"):
        train(model, heads)
