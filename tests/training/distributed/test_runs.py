"""A run on many processes: its folder is one process's, and any number of them resumes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.checkpoints import damage, numbered
from jumprelu_plugin.training.distributed.launch import joined, require_sizes
from jumprelu_plugin.training.distributed.runner import train_sharded
from tests.tiny import D_MODEL
from tests.training.distributed.processes import run_on
from tests.training.runs import config, run, token_rows

STEPS, BATCH = 40, 62
SAE_CONFIG = {
    "target_l0": 7,
    "step_kernel": "sparse",
    "matryoshka_loss_weight": 0.5,
    "matryoshka_widths": [8, 16],
    "max_latent_density": 0.2,
}


def small(folder: Path, **fields: Any) -> Any:
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=fields.pop("d_sae", 48), **SAE_CONFIG)
    given = {
        "sae": sae,
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "lr_decay_steps": 8,
        "n_checkpoints": 1,
        **fields,
    }
    return config(folder, **given)


def on_many(model: Any, folder: Path, sizes: tuple[int, int], fields: dict[str, Any]) -> str | None:
    """What ends the run on this process; None where it went well."""
    cfg = small(folder, **fields)
    # As the command line's, of a class that no process can unpickle.
    cfg.__class__ = type("CommandLineRunnerConfig", (type(cfg),), {})
    try:
        train_sharded(
            cfg,
            data_parallel_size=sizes[0],
            model_parallel_size=sizes[1],
            override_model=model,
            override_dataset=token_rows(),
            check_first=False,
        )
    except (ValueError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return None


def last_checkpoint(folder: Path) -> Path:
    (place,) = (folder / "checkpoints").iterdir()
    return numbered(place)[-1]


def assert_same_output(found: Path, expected: Path) -> None:
    ours, theirs = (SAE.load_from_disk(f / "output").state_dict() for f in (found, expected))
    for name, value in theirs.items():
        # A bias is added to pre-activations, and as exact as these.
        scale = theirs["threshold" if name == "b_enc" else name].abs().max()
        assert (ours[name] - value).abs().max() <= 2e-6 * scale, name
    cfgs = [json.loads((f / "output" / "cfg.json").read_text()) for f in (found, expected)]
    for cfg in cfgs:
        assert cfg["metadata"].pop("l0") == pytest.approx(7, abs=1)
    assert cfgs[0] == cfgs[1]


@pytest.fixture(scope="module")
def one(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run(model, small(folder), token_rows(), check_first=False)
    return folder


def finished(model: Any, folder: Path, sizes: tuple[int, int], **fields: Any) -> Path:
    ended = run_on(sizes[0] * sizes[1], on_many, folder / "results", model, folder, sizes, fields)
    assert not any(ended), ended
    return folder


@pytest.fixture(scope="module", params=[(1, 2), (2, 1)], ids=["latents", "tokens"])
def sizes(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def two(model: Any, sizes: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(model, tmp_path_factory.mktemp("two"), sizes)


def test_the_folder_is_one_processs(one: Path, two: Path) -> None:
    assert_same_output(two, one)
    lines = [
        [json.loads(line) for line in (folder / "output" / "metrics.jsonl").open()]
        for folder in (one, two)
    ]
    for expected, found in zip(*lines, strict=True):
        assert found.keys() == expected.keys()
        # A summand of the loss is as exact as the loss.
        scale = max(1.0, expected.get("losses/overall_loss", 0.0))
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-6, abs=2e-6 * scale), name


def test_two_processes_checkpoint_goes_on_in_one(
    model: Any, one: Path, two: Path, tmp_path: Path
) -> None:
    checkpoint = last_checkpoint(two)
    assert damage(checkpoint) is None
    cfg = small(tmp_path, resume_from_checkpoint=str(checkpoint))
    run(model, cfg, token_rows(), check_first=False)
    assert_same_output(tmp_path, one)


def test_one_processs_checkpoint_goes_on_in_two(
    model: Any, sizes: tuple[int, int], one: Path, tmp_path: Path
) -> None:
    finished(model, tmp_path, sizes, resume_from_checkpoint=str(last_checkpoint(one)))
    assert_same_output(tmp_path, one)


def test_with_another_schedule_two_go_on_as_one_does(
    model: Any, one: Path, sizes: tuple[int, int], tmp_path: Path
) -> None:
    given = {"resume_from_checkpoint": str(last_checkpoint(one)), "lr": 7e-4, "lr_decay_steps": 3}
    run(model, small(tmp_path / "one", **given), token_rows(), check_first=False)
    finished(model, tmp_path / "two", sizes, **given)
    assert_same_output(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_four_processes_write_and_resume_the_same_folders(
    model: Any, one: Path, two: Path, tmp_path: Path
) -> None:
    finished(model, tmp_path / "anew", (2, 2))
    assert_same_output(tmp_path / "anew", one)
    finished(model, tmp_path / "on", (2, 2), resume_from_checkpoint=str(last_checkpoint(two)))
    assert_same_output(tmp_path / "on", one)


def test_an_error_ends_every_process_and_the_first_says_why(
    model: Any, one: Path, tmp_path: Path
) -> None:
    for sizes, fields, message in (
        (
            (1, 2),
            {"d_sae": 49},
            "ValueError d_sae is 49, which model_parallel_size=2 does not divide",
        ),
        (
            (2, 1),
            {"train_batch_size_tokens": BATCH + 1},
            "ValueError train_batch_size_tokens is 63, which data_parallel_size=2 does not divide",
        ),
        (
            (1, 2),
            {"d_sae": 64, "resume_from_checkpoint": str(last_checkpoint(one))},
            "ValueError the checkpoint .* has d_sae 48 and this run 64",
        ),
    ):
        ended = run_on(2, on_many, tmp_path / "results", model, tmp_path, sizes, fields)
        first, second = ended
        assert second == "SystemExit 2"
        with pytest.raises(ValueError, match=message):
            raise ValueError(first)


def what_differs(folder: Path, what: str) -> str:
    import os

    rank = int(os.environ["RANK"])
    cfg, options = small(folder), {}
    if what == "config":
        cfg = dataclasses.replace(cfg, seed=rank)
    else:
        options = {"check_first": rank == 0}
    try:
        train_sharded(cfg, data_parallel_size=2, **options)
    except (ValueError, SystemExit) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["config", "set of options"])
def test_processes_that_were_started_otherwise_are_refused(what: str, tmp_path: Path) -> None:
    first, second = run_on(2, what_differs, tmp_path / "results", tmp_path, what)
    assert f"process 1 has another {what} than process 0" in first and second == "2"


def test_sizes_and_devices_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="data_parallel_size is 0; expected"):
        require_sizes(0, 1, "cpu")
    with pytest.raises(ValueError, match="there is one process: start the run with torchrun"):
        require_sizes(1, 2, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(ValueError, match="is 4, and torchrun started 3 processes: .* product is 3"),
        joined(2, 2, "cpu"),
    ):
        pass
    if not torch.distributed.is_nccl_available():
        with pytest.raises(ValueError, match="this PyTorch has no NCCL"):
            require_sizes(3, 1, "cuda")


def on_its_own_disk(model: Any, folder: Path, resume: str | None) -> str | None:
    """As on machines without a shared file system: each process has a working directory."""
    import os

    own = folder / os.environ["RANK"]
    own.mkdir(exist_ok=True)
    os.chdir(own)
    fields = {"checkpoint_path": "checkpoints", "output_path": None}
    return on_many(model, Path(), (1, 2), {**fields, "resume_from_checkpoint": resume})


def test_a_checkpoint_that_one_process_alone_finds_is_refused(model: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert not any(run_on(2, on_its_own_disk, results, model, tmp_path, None))
    first, second = run_on(2, on_its_own_disk, results, model, tmp_path, "auto")
    assert "process 1: checkpoints/" in first and "is not a checkpoint of this run" in first
    assert second == "SystemExit 2"
