"""Several dictionaries in one pass over the text against a run of each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig
from safetensors.torch import load_file

from jumprelu_plugin import JumpReLUMultiTrainingRunner, JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.tiny import (
    D_MODEL,
    HEADS,
    MLP,
    tiny_hf,
    tiny_hooked,
    tiny_tokenizer,
)
from tests.training.multi.runs import D_SAE, STEPS, dictionaries, of, train, weights
from tests.training.runs import token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


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
