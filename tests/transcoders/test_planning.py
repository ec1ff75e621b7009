"""`--check_only` over layers: what a run would take, and whether it fits, with nothing written."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.training.distributed.hardware import HARDWARE
from jumprelu_plugin.training.health.memory import size
from jumprelu_plugin.transcoders import planning
from jumprelu_plugin.transcoders.clt.planning import plan_clt
from jumprelu_plugin.transcoders.clt.run import train_clt
from jumprelu_plugin.transcoders.memory import MemoryEstimate
from jumprelu_plugin.transcoders.per_layer.planning import plan_transcoders
from jumprelu_plugin.transcoders.per_layer.run import train_transcoders
from tests.tiny import N_LAYERS
from tests.transcoders.clt import test_run as clt
from tests.transcoders.per_layer import test_run as per_layer

GB = 10**9


def memory_line(run: Any) -> str:
    """What a run says of its memory before it starts."""
    said: list[str] = []
    run(said.append)
    return next(str(line) for line in said if "memory" in str(line))


@pytest.mark.parametrize(
    ("plan_of", "train", "of"),
    [(plan_clt, train_clt, clt), (plan_transcoders, train_transcoders, per_layer)],
    ids=["clt", "transcoders"],
)
def test_the_memory_is_what_the_run_says(
    plan_of: Any, train: Any, of: Any, model: Any, tmp_path: Path
) -> None:
    settings, text = of.settings(), of.text()
    plan = plan_of(tmp_path / "planned", settings, model=model, dataset=text)
    assert not (tmp_path / "planned").exists()

    def run(log: Any) -> None:
        train(tmp_path / "run", settings, model=model, dataset=text, log=log)

    assert str(plan.memory) in memory_line(run)
    assert plan.processes == 1
    plan.refuse()


@pytest.mark.parametrize("plan_of, of", [(plan_clt, clt), (plan_transcoders, per_layer)])
@pytest.mark.parametrize(
    ("changes", "wrong"),
    [({"device": "cuda:7"}, "CUDA device"), ({"checkpoint_every_n_minutes": -3.0}, "-3")],
)
def test_what_the_run_refuses_first_the_plan_refuses_first(
    plan_of: Any, of: Any, changes: dict[str, Any], wrong: str, tmp_path: Path
) -> None:
    settings = of.settings(model_name="there is none", **changes)
    with pytest.raises(ValueError, match=wrong):
        plan_of(tmp_path / "planned", settings)


@pytest.mark.parametrize("plan_of, of", [(plan_clt, clt), (plan_transcoders, per_layer)])
@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"d_sae": 32, "target_l0": 64.0}, "target_l0 is 64.0; it must be at most d_sae"),
        ({"target_l0": 0.0}, "target_l0 is 0.0"),
        ({"target_l0": math.nan}, "target_l0 is nan"),
        ({"max_latent_density": 0.0}, "max_latent_density is 0.0"),
        ({"outlier_norm_ratio": -1.0}, "outlier_norm_ratio is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"dataset_path": "/there/is/none"}, "no such folder"),
    ],
)
def test_what_the_run_refuses_the_plan_refuses(
    plan_of: Any, of: Any, changes: dict[str, Any], wrong: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=wrong):
        plan_of(tmp_path / "planned", of.settings(**changes), model=model)


@pytest.mark.parametrize("plan_of, of", [(plan_clt, clt), (plan_transcoders, per_layer)])
def test_a_text_that_the_hub_does_not_give_is_refused(
    plan_of: Any, of: Any, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="nobody/no_such_text"):
        plan_of(tmp_path / "planned", of.settings(dataset_path="nobody/no_such_text"), model=model)


@pytest.mark.parametrize(
    ("train", "of"), [(train_clt, clt), (train_transcoders, per_layer)], ids=["clt", "transcoders"]
)
def test_a_limit_that_is_not_held_is_said(
    train: Any, of: Any, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = of.settings(d_sae=60, target_l0=5.0, max_latent_density=0.09, training_tokens=500)
    train(tmp_path / "run", settings, model=model, dataset=of.text(), log=lambda _: None)
    assert "max_latent_density is 0.09, too near the mean density 0.0833" in caplog.text
    assert "give 0.167 or more" in caplog.text
    assert caplog.text.count("max_latent_density is 0.09") == 1
    caplog.clear()
    settings = of.settings(d_sae=None, target_l0=30.0, max_latent_density=0.1, training_tokens=500)
    train(tmp_path / "wide", settings, model=model, dataset=of.text(), log=lambda _: None)
    assert caplog.text.count("max_latent_density is 0.1, too near") == 1


def test_shards_divide_what_is_held_and_say_what_they_exchange(model: Any, tmp_path: Path) -> None:
    settings = clt.settings(d_sae=60, target_l0=5.0)
    one, two = (
        plan_clt(
            tmp_path / "planned", settings, model_parallel_size=m, model=model, dataset=clt.text()
        )
        for m in (1, 2)
    )
    biases = 4 * 4 * N_LAYERS * model.cfg.d_model  # b_dec is held by each
    assert two.memory.transcoders == (one.memory.transcoders - biases) / 2 + biases
    names = [name for name, _ in two.numbers]
    assert "it hands over" in names and "a process has" in names
    assert "it hands over" not in [name for name, _ in one.numbers]


def test_processes_divide_the_layers_and_say_what_they_exchange(model: Any, tmp_path: Path) -> None:
    settings, text = per_layer.settings(), per_layer.text()
    one, two = (
        plan_transcoders(
            tmp_path / "planned", settings, processes=n, model=model, dataset=text, gpu="h200"
        )
        for n in (1, 2)
    )
    layers, first = N_LAYERS, -(-N_LAYERS // 2)
    sequences, share = settings.store_batch_size_prompts, 3  # of a pass
    assert sequences == 5
    alone = per_layer.settings(layers=list(range(0, layers, 2)))
    assert two.memory == plan_transcoders(tmp_path / "p", alone, model=model, dataset=text).memory
    assert (two.processes, two.room, two.place) == (2, 141 * GB, HARDWARE["h200"].name)
    said = dict(two.numbers)
    assert said["a process has"] == f"{first} of {layers} layers at most"
    # The second process has one layer, and sends what the first needs of its share.
    handed_over = 41 * share * 4 * 2 * model.cfg.d_model * first // sequences
    assert said["it hands over"] == f"activations, {size(handed_over)} a step at most"
    assert "it hands over" not in dict(one.numbers)
    with pytest.raises(ValueError, match=f"there are {layers} layers to train"):
        plan_transcoders(tmp_path, settings, processes=layers + 1, model=model, dataset=text)
    with pytest.raises(ValueError, match="processes is 0"):
        plan_transcoders(tmp_path, settings, processes=0, model=model, dataset=text)


def test_a_pass_that_processes_do_not_divide_is_said(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "store_batch_size_prompts is 5, which 2 processes do not divide"
    plans: list[tuple[Any, Any, Any]] = [
        (plan_clt, partial(plan_clt, model_parallel_size=2), clt),
        (plan_transcoders, partial(plan_transcoders, processes=2), per_layer),
    ]
    for on_one, on_two, of in plans:
        settings = of.settings(store_batch_size_prompts=5, d_sae=60, target_l0=5.0)
        on_one(tmp_path / "p", settings, model=model, dataset=of.text())
        assert said not in caplog.text
        on_two(tmp_path / "p", settings, model=model, dataset=of.text())
        assert caplog.text.count(said) == 1
        caplog.clear()


def test_a_gpu_that_is_named_is_what_the_run_must_fit_on(model: Any, tmp_path: Path) -> None:
    plan = plan_clt(
        tmp_path / "planned", clt.settings(), gpu="a100", model=model, dataset=clt.text()
    )
    assert (plan.room, plan.place) == (80 * GB, HARDWARE["a100"].name)
    assert HARDWARE["a100"].name in dict(plan.numbers)["bound by"]
    with pytest.raises(ValueError, match="hardware is 'tpu'"):
        plan_clt(tmp_path / "planned", clt.settings(), gpu="tpu", model=model)


@pytest.mark.parametrize(
    ("memory", "change"),
    [
        (MemoryEstimate(7 * GB, GB, GB, GB), "a smaller model"),
        (MemoryEstimate(GB, 7 * GB, GB, GB), "a smaller d_sae"),
        (MemoryEstimate(GB, GB, 7 * GB, GB), "n_batches_in_buffer"),
        (MemoryEstimate(GB, GB, GB, 7 * GB), "train_batch_size_tokens"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_helps(memory: MemoryEstimate, change: str) -> None:
    plan = planning.LayerPlan(3, memory, room=11 * GB, place="cpu", numbers=())
    plan.refuse()
    for room in (9 * GB, None):
        smaller = dataclasses.replace(plan, room=room)
        if room is None:
            smaller.refuse()  # nobody knows
            continue
        with pytest.raises(ValueError, match=change):
            smaller.refuse()


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available", lambda device: 21 * GB)
    assert planning.room_of_each("cpu", 3, None) == (7 * GB, "cpu")
    monkeypatch.setattr(planning, "available", lambda device: None)
    assert planning.room_of_each("cpu", 3, None) == (None, "cpu")


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"model_parallel_size": 7}, "d_sae"),
        ({"data_parallel_size": 5}, "train_batch_size_tokens"),
        ({"model_parallel_size": 0}, "model_parallel_size"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_the_model(
    tmp_path: Path, given: dict[str, int], wrong: str
) -> None:
    settings = clt.settings(d_sae=60, train_batch_size_tokens=42, model_name="there is none")
    with pytest.raises(ValueError, match=wrong):
        plan_clt(tmp_path / "planned", settings, **given)


def test_on_the_command_line(tmp_path: Path) -> None:
    common = ["--output_path", str(tmp_path / "out"), "--layers", "0-1", "--d_sae", "64"]
    done = CliRunner().invoke(app, ["train-transcoders", *common, "--check_only"])
    assert done.exit_code == 0 and "2 transcoders" in done.output, done.output
    many = ["--model_parallel_size", "8", "--hardware", "h200", "--check_only"]
    done = CliRunner().invoke(app, ["train-clt", *common, *many])
    assert done.exit_code == 0, done.output
    flat = re.sub(r"[^\w.]+", " ", done.output)
    assert "8 processes" in flat and "8 latents of each layer" in flat and "141" in flat
    done = CliRunner().invoke(app, ["train-clt", *common, "--hardware", "h200"])
    assert done.exit_code != 0 and "check_only" in f"{done.output}{done.exception}"
    for flag, value in (("--processes", "2"), ("--hardware", "h200")):
        done = CliRunner().invoke(app, ["train-transcoders", *common, flag, value])
        assert done.exit_code != 0 and "check_only" in f"{done.output}{done.exception}"
    assert not (tmp_path / "out").exists()
