"""Transcoders of all layers in one run: resumed, refused, within the stated memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file
from torch import Tensor

from jumprelu_plugin.transcoders.memory import transcoder_parameters
from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings, train_transcoders
from jumprelu_plugin.transcoders.per_layer.runner import LayerwiseTrainer
from tests.tiny import D_MODEL, N_LAYERS, WIDTH
from tests.training.transcoder_runs import LN, MID, POSITIONS, Z, text, transcoder_config


def settings(**changes: Any) -> TranscoderSettings:
    fields: dict[str, Any] = {
        "model_name": "tiny-gemma-2-test",
        "d_sae": 59,
        "target_l0": 7.0,
        "training_tokens": 13 * 41,
        "train_batch_size_tokens": 41,
        "context_size": POSITIONS,
        "store_batch_size_prompts": 5,
        "n_batches_in_buffer": 13,
        "n_batches_for_norm_estimate": 3,
        "n_checkpoints": 3,
        "lr": 3e-3,
        "step_kernel": "sparse",
    }
    return TranscoderSettings(**{**fields, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{layer.name}/{name}": value
        for layer in sorted(folder.glob("layer_*"))
        for name, value in load_file(layer / "sae_weights.safetensors").items()
    }


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put a step's number in the list: after it, the process is sent SIGINT, as by Ctrl-C."""
    steps: list[int] = []
    update = LayerwiseTrainer._update_pbar

    def wrapped(self: LayerwiseTrainer, *args: Any, **kwargs: Any) -> None:
        if self.n_training_steps in steps:
            signal.raise_signal(signal.SIGINT)
        update(self, *args, **kwargs)

    monkeypatch.setattr(LayerwiseTrainer, "_update_pbar", wrapped)
    before = signal.getsignal(signal.SIGINT)
    yield steps
    assert signal.getsignal(signal.SIGINT) is before


def test_every_layer_is_monitored_and_its_alarm_names_it(
    model: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wild = settings(training_tokens=103 * 41, lr=1.0)
    with caplog.at_level("WARNING"):
        train_transcoders(tmp_path / "set", wild, model=model, dataset=text())
    lines = [json.loads(line) for line in (tmp_path / "set/metrics.jsonl").read_text().splitlines()]
    raised = {line["of"]: line for line in lines if line.get("alarm") == "loss spike"}
    names = [f"layer_{layer}" for layer in range(N_LAYERS)]
    assert sorted(raised) == names
    said = [record.getMessage() for record in caplog.records]
    for name, line in raised.items():
        assert line["step"] == 99 and "lower lr" in line["suggestion"]
        assert said.count(f"{name}, step 99: {line['message']}; {line['suggestion']}") == 1
    measured = [line for line in lines if "layer_0" in line]
    assert all("health/encoder_growth" in measured[-1][name] for name in names)


@pytest.mark.parametrize("skip", [False, True])
def test_all_layers_stopped_and_resumed_are_the_uninterrupted_run(
    model: Any, skip: bool, stop_at: list[int], tmp_path: Path
) -> None:
    said: list[Any] = []
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    train_transcoders(whole, settings(skip=skip), model=model, dataset=text(), log=said.append)
    assert said and str(said[0]).startswith("memory: ")
    names = [f"layer_{layer}" for layer in range(N_LAYERS)]
    assert sorted(p.name for p in whole.iterdir()) == [*names, "metrics.jsonl", "transcoders.json"]
    record = json.loads((whole / "transcoders.json").read_text())
    assert [layer["folder"] for layer in record["layers"]] == names
    assert record["layers"][2]["hook_name"] == f"blocks.2.{LN}"
    assert record["settings"]["d_sae"] == 59 and record["provenance"]["seed"] == 0

    for step in (4, 9):
        stop_at[:] = [step]
        with pytest.raises(InterruptedException):
            train_transcoders(paused, settings(skip=skip), model=model, dataset=text())
        saved = sorted(int(path.name) // 41 for path in (paused / "checkpoints").iterdir())
        assert saved == ([4] if step == 4 else [7, 9])
        assert not list(paused.glob("layer_*"))
    stop_at.clear()
    train_transcoders(paused, settings(skip=skip), model=model, dataset=text())
    assert not (paused / "checkpoints").exists()
    found, expected = weights(paused), weights(whole)
    assert len(found) == len(names) * (6 if skip else 5)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_transcoders(whole, settings(), model=model, dataset=text())
    update = LayerwiseTrainer._update_pbar

    def dies(self: LayerwiseTrainer, *args: Any, **kwargs: Any) -> None:
        if self.n_training_steps == 8:
            raise SystemError("killed")
        update(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(LayerwiseTrainer, "_update_pbar", dies)
        train_transcoders(killed, settings(), model=model, dataset=text())
    train_transcoders(killed, settings(), model=model, dataset=text())
    for name, value in weights(whole).items():
        assert torch.equal(weights(killed)[name], value), name


def test_layers_and_hooks_can_be_chosen(model: Any, tmp_path: Path) -> None:
    chosen = settings(
        layers=(0, 2), hook_name="blocks.{layer}." + Z, hook_name_out="blocks.{layer}." + MID
    )
    train_transcoders(tmp_path / "out", chosen, model=model, dataset=text())
    folders = sorted((tmp_path / "out").glob("layer_*"))
    assert [folder.name for folder in folders] == ["layer_0", "layer_2"]
    sae = SAE.load_from_disk(folders[1])
    assert (sae.cfg.d_in, sae.cfg.d_out) == (WIDTH[f"blocks.1.{Z}"], D_MODEL)  # type: ignore[attr-defined]
    assert sae.cfg.metadata.hook_name_out == f"blocks.2.{MID}"


def test_output_folders_are_not_overwritten(model: Any, stop_at: list[int], tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty"):
        train_transcoders(tmp_path / "foreign", settings(), model=model, dataset=text())
    stop_at[:] = [3]
    with pytest.raises(InterruptedException):
        train_transcoders(tmp_path / "out", settings(), model=model, dataset=text())
    with pytest.raises(ValueError, match=r"unfinished run with lr=0\.003, and lr is 0\.1 now"):
        train_transcoders(tmp_path / "out", settings(lr=0.1), model=model, dataset=text())
    stop_at.clear()
    train_transcoders(tmp_path / "out", settings(), model=model, dataset=text())
    with pytest.raises(ValueError, match="already holds finished"):
        train_transcoders(tmp_path / "out", settings(), model=model, dataset=text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 3)}, "no layer 3"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, r"must both hold \{layer\}"),
        ({"hook_name_out": "blocks.{layer}.hook_mlp_uot"}, "no hook 'blocks.0.hook_mlp_uot'"),
        ({"recipe": "gemma_scope"}, "no recipe 'gemma_scope' for transcoders"),
        ({"memory_gb": 1e-4}, "more than memory_gb=0.0001"),
        ({"training_tokens": 40}, "less than a batch"),
        ({"context_size": 65}, "context_size is 65.*at most 64"),
        ({"target_l0": 7.0, "l0_coefficient": 0.1}, "both target_l0=7 and l0_coefficient=0.1"),
        ({"target_l0": 60.0}, "at most d_sae, which is 59"),
    ],
)
def test_a_set_that_cannot_be_trained_is_refused(
    model: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_transcoders(tmp_path / "out", settings(**changes), model=model, dataset=text())
    assert not (tmp_path / "out").exists()


def test_a_recipe_s_schedules_are_shortened_to_the_run(
    model: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    chosen = settings(
        recipe="gemma_scope_transcoder", target_l0=None, lr=None, training_tokens=31 * 41
    )
    with caplog.at_level("WARNING"):
        train_transcoders(tmp_path / "set", chosen, model=model, dataset=text())
    # 1,000 and 31 // 5 steps, in the same ratio in half of the run.
    lr = "lr_warm_up_steps 1,000 and lr_decay_steps 6 do not fit into 31 steps: shortened to 15 and"
    assert caplog.text.count(lr) == 1
    l0 = "l0_warm_up_steps is 10,000 and the run has 31 steps"
    assert caplog.text.count(l0) == 1 and "shortened to 15" in caplog.text
    sae = SAE.load_from_disk(tmp_path / "set/layer_1")
    lines = [json.loads(line) for line in (tmp_path / "set/metrics.jsonl").read_text().splitlines()]
    last = [line["layer_1"] for line in lines if "layer_1" in line][-1]
    assert last["details/l0_coefficient"] == pytest.approx(6e-4)
    assert last["details/current_learning_rate"] == pytest.approx(7e-5)
    assert sae.cfg.architecture() == "jumprelu_transcoder"


def test_a_target_replaces_the_recipe_s_fixed_penalty(model: Any, tmp_path: Path) -> None:
    chosen = settings(recipe="gemma_scope_transcoder", layers=(1,))
    train_transcoders(tmp_path / "set", chosen, model=model, dataset=text())
    assert (tmp_path / "set/layer_1/cfg.json").is_file()


def test_the_chunk_shrinks_to_the_memory(model: Any, tmp_path: Path) -> None:
    said: list[Any] = []
    big = settings(n_batches_in_buffer=100_000, memory_gb=0.002, training_tokens=3 * 41)
    train_transcoders(tmp_path / "out", big, model=model, dataset=text(), log=said.append)
    record = json.loads((tmp_path / "out" / "transcoders.json").read_text())
    assert record["memory_estimate"]["total"] <= 2_000_000
    sae = SAE.load_from_disk(tmp_path / "out" / "layer_1")
    counted = transcoder_parameters(transcoder_config())
    assert counted == sum(parameter.numel() for parameter in sae.parameters())


MEASURE = """
import resource, sys
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings, train_transcoders
model = load_model()
text = tokenized_dataset(model.tokenizer, 128, "train")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, said = peak(), []
settings = TranscoderSettings(
    layers=(0, 5), d_sae=8192, training_tokens=5 * 2048, train_batch_size_tokens=2048,
    n_batches_in_buffer=512, n_batches_for_norm_estimate=2, n_checkpoints=0, evaluation_sequences=0,
)
train_transcoders(sys.argv[1], settings, model=model, dataset=text, log=said.append)
print("grew", peak() - before)
"""


@pytest.mark.slow
def test_the_stated_memory_is_kept(tmp_path: Path) -> None:
    """The peak of a process, beyond what it held with the model loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grew = float(done.stdout.split("grew")[1])
    record = json.loads((tmp_path / "out" / "transcoders.json").read_text())["memory_estimate"]
    # 100 MB for what libraries load on first use.
    stated = record["total"] - record["model"]
    assert 0.3 * stated < grew < stated + 1e8, (grew, record)
