"""Whole runs of a cross-layer transcoder: resumed, refused, within the stated memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file
from torch import Tensor

from jumprelu_plugin.transcoders.clt import CLTTrainingConfig, evaluate_clt, load_clt, run
from jumprelu_plugin.transcoders.clt.memory import parameter_count
from jumprelu_plugin.transcoders.clt.run import CLTSettings, train_clt
from jumprelu_plugin.transcoders.clt.trainer import Trainer
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep
from tests.tiny import N_LAYERS, tiny_tokens
from tests.transcoders.clt.random_clt import LAYERS, random_batch, random_clt, set_bandwidths

pytestmark = pytest.mark.usefixtures("one_thread")
POSITIONS = 17
LN, OUT = "blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"


def text(sequences: int = 97) -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(sequences, POSITIONS).tolist()})


def settings(**changes: Any) -> CLTSettings:
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
    return CLTSettings(**{**fields, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.stem}/{name}": value
        for path in sorted(folder.glob("layer_*"))
        for name, value in load_file(path).items()
    }


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put a step's number in the list: after it, the process is sent SIGINT, as by Ctrl-C."""
    steps: list[int] = []
    show = Trainer._show

    def wrapped(self: Trainer, *args: Any) -> None:
        if self.step in steps:
            signal.raise_signal(signal.SIGINT)
        show(self, *args)

    monkeypatch.setattr(Trainer, "_show", wrapped)
    before = signal.getsignal(signal.SIGINT)
    yield steps
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(
    model: Any, stop_at: list[int], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    said: list[Any] = []
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    train_clt(whole, settings(), model=model, dataset=text(), log=said.append)
    assert not [w for w in recwarn if "fewer samples" in str(w.message)]
    assert str(said[0]).startswith("memory: ")
    files = [*(f"layer_{layer}.safetensors" for layer in range(N_LAYERS))]
    others = ["cross_layer.json", "cross_layer_record.json", "metrics.jsonl"]
    assert sorted(path.name for path in whole.iterdir()) == sorted([*files, *others])
    record = json.loads((whole / "cross_layer_record.json").read_text())
    assert record["config"]["layers"] == [0, 1, 2] and len(record["l0_in_training"]) == N_LAYERS
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(lines[0]["fvu"]) == len(lines[0]["coefficient"]) == N_LAYERS
    for step in (4, 9):
        stop_at[:] = [step]
        with pytest.raises(InterruptedException):
            train_clt(paused, settings(), model=model, dataset=text())
        saved = sorted((paused / "checkpoints").iterdir(), key=lambda path: int(path.name))
        assert [path.name for path in saved] == (["3", "4"] if step == 4 else ["6", "9"])
        assert not list(paused.glob("layer_*"))
    with pytest.raises(ValueError, match=r"unfinished run with lr=0\.003, and lr is 0\.1 now"):
        train_clt(paused, settings(lr=0.1), model=model, dataset=text())
    stop_at.clear()
    train_clt(paused, settings(), model=model, dataset=text())
    assert not (paused / "checkpoints").exists()
    found, expected = weights(paused), weights(whole)
    assert len(found) == 5 * N_LAYERS
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    with pytest.raises(ValueError, match="already holds finished"):
        train_clt(whole, settings(), model=model, dataset=text())


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # With silent latents among what a checkpoint has to hold.
    chosen = settings(training_tokens=70 * 41, target_l0=3.0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_clt(whole, chosen, model=model, dataset=text())
    show = Trainer._show

    def dies(self: Trainer, *args: Any) -> None:
        if self.step == 60:
            raise SystemError("killed")
        show(self, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Trainer, "_show", dies)
        train_clt(killed, chosen, model=model, dataset=text())
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["35", "52"]
    train_clt(killed, chosen, model=model, dataset=text())
    for name, value in weights(whole).items():
        assert torch.equal(weights(killed)[name], value), name


def test_what_is_saved_takes_and_gives_the_model_s_own_activations(
    model: Any, tmp_path: Path
) -> None:
    """Trained on scaled rows, judged on raw ones: folding both sides leaves the fit as it was."""
    chosen = settings(training_tokens=150 * 41, target_l0=11.0)
    train_clt(tmp_path, chosen, model=model, dataset=text())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    in_training = json.loads(lines[-1])["fvu"]
    found = evaluate_clt(model, load_clt(tmp_path), tiny_tokens(41, POSITIONS))
    for layer, fvu in zip(found.layers, in_training, strict=True):
        assert layer.fvu == pytest.approx(fvu, rel=0.35) and layer.fvu < 0.9
        assert layer.l0 == pytest.approx(11, rel=0.25)


def test_every_layer_is_monitored_and_its_alarm_names_it(
    model: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wild = settings(training_tokens=103 * 41, lr=1.0, layers=(1, 2))
    with caplog.at_level("WARNING"):
        train_clt(tmp_path / "clt", wild, model=model, dataset=text())
    lines = [json.loads(line) for line in (tmp_path / "clt/metrics.jsonl").read_text().splitlines()]
    raised = {line["of"]: line for line in lines if line.get("alarm") == "loss spike"}
    assert sorted(raised) == ["layer_1", "layer_2"]
    said = [record.getMessage() for record in caplog.records]
    for name, line in raised.items():
        assert line["step"] == 99 and "lower lr" in line["suggestion"]
        assert said.count(f"{name}, step 99: {line['message']}; {line['suggestion']}") == 1


def test_a_penalty_that_silences_latents_shows_it_and_raises_an_alarm(
    model: Any, tmp_path: Path
) -> None:
    # Silent means for 288 steps at this width and batch; there are looks at steps 300 and 400.
    harsh = settings(training_tokens=407 * 41, target_l0=None, l0_coefficient=30.0)
    train_clt(tmp_path / "clt", harsh, model=model, dataset=text())
    lines = [json.loads(line) for line in (tmp_path / "clt/metrics.jsonl").read_text().splitlines()]
    names = {(line["of"], line["alarm"]) for line in lines if "alarm" in line}
    assert {("layer_0", "latents dying"), ("layer_2", "latents dying")} <= names
    assert [line["dead"] for line in lines if "dead" in line][-1] > 0.5


def test_a_warm_up_longer_than_the_run_is_shortened(
    model: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    chosen = settings(target_l0=None, l0_coefficient=0.3, l0_warm_up_steps=1_009)
    with caplog.at_level("WARNING"):
        train_clt(tmp_path, chosen, model=model, dataset=text())
    assert caplog.text.count("l0_warm_up_steps is 1,009 and the run has 13 steps") == 1
    assert "shortened to 6" in caplog.text
    record = json.loads((tmp_path / "cross_layer_record.json").read_text())
    assert record["coefficients"] == [0.3] * N_LAYERS
    assert record["settings"]["l0_warm_up_steps"] == 1_009  # the same command goes on


def test_layers_can_be_chosen(model: Any, tmp_path: Path) -> None:
    chosen = settings(layers=(1, 2), hook_name="blocks.{layer}.hook_resid_mid")
    train_clt(tmp_path / "out", chosen, model=model, dataset=text())
    saved = load_clt(tmp_path / "out")
    assert saved.cfg.pairs[0].hook_in == "blocks.1.hook_resid_mid"
    assert sum(parameter.numel() for parameter in saved.parameters()) == parameter_count(saved.cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 2)}, "layers are 0, 2.*consecutive"),
        ({"layers": (1, 0)}, "consecutive and ascending"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (2, 3)}, "no layer 3"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, r"must hold \{layer\}"),
        ({"hook_name_out": "blocks.{layer}.hook_mlp_uot"}, "no hook 'blocks.0.hook_mlp_uot'"),
        ({"hook_name": OUT, "hook_name_out": LN}, "computed before"),
        ({"hook_name": OUT}, "that is an SAE"),
        ({"memory_gb": 1e-4}, "more than memory_gb=0.0001"),
        ({"training_tokens": 40}, "less than a batch"),
        ({"target_l0": 60.0}, "at most d_sae, which is 59"),
        ({"outlier_norm_ratio": -1.0}, "outlier_norm_ratio is -1.*give at least 0"),
        ({"target_l0": 7.0, "l0_coefficient": 0.1}, "both target_l0=7 and l0_coefficient=0.1"),
        ({"context_size": 65}, "context_size is 65.*at most 64"),
        ({"target_l0": 7.0, "l0_warm_up_steps": 9}, "l0_warm_up_steps is 9.*no fixed penalty"),
        ({"target_l0": 7.0, "jumprelu_tanh_scale": 2.0}, "jumprelu_tanh_scale is 2.*has no tanh"),
        ({"jumprelu_sparsity_loss_mode": "quadratic"}, "must be one of step, tanh"),
        ({"d_sae": 0}, "d_sae is 0"),
        (
            {"target_l0": None, "l0_coefficient": 0.1, "l0_warm_up_steps": -9},
            "l0_warm_up_steps is -9; it must be 0 or more",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    model: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_clt(tmp_path / "out", settings(**changes), model=model, dataset=text())
    assert not list(tmp_path.glob("out/*"))


def test_unequal_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="output hooks have unequal widths.*a: 3, b: 5"):
        run._one_width({"a": 3, "b": 5}, "output")


def test_activations_that_are_not_finite_are_named() -> None:
    inputs, targets = random_batch()
    training_step = CLTTrainingStep(random_clt(), CLTTrainingConfig(target_l0=5.0))
    set_bandwidths(training_step, [0.5] * LAYERS)
    targets[1][3, 2] = torch.inf
    with pytest.raises(ValueError, match="blocks.1.hook_mlp_out hold NaN or infinite"):
        training_step.loss(inputs, targets)


MEASURE = """
import resource, sys
from jumprelu_plugin.transcoders.clt.run import CLTSettings, train_clt
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import tokenized_dataset
model = load_model()
text = tokenized_dataset(model.tokenizer, 128, "train")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
settings = CLTSettings(
    layers=(0, 1, 2), d_sae=4096, training_tokens=5 * 1024, train_batch_size_tokens=1024,
    n_batches_in_buffer=256, n_batches_for_norm_estimate=2, n_checkpoints=0,
    evaluation_sequences=0, step_kernel=sys.argv[2],
)
train_clt(sys.argv[1], settings, model=model, dataset=text)
print("grew", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_the_stated_memory_is_kept(path: str, tmp_path: Path) -> None:
    """The peak of a process, beyond what it held with the model loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out"), path],
        capture_output=True,
        text=True,
        # glibc then gives back what is freed; otherwise it keeps some of what it had.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    assert done.returncode == 0, done.stderr
    grew = float(done.stdout.split("grew")[1])
    record = json.loads((tmp_path / "out" / "cross_layer_record.json").read_text())
    stated = record["memory_estimate"]["total"] - record["memory_estimate"]["model"]
    # 100 MB for what libraries load on first use.
    assert 0.3 * stated < grew < stated + 1e8, (grew, record["memory_estimate"])
