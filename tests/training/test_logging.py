"""The same metrics with wandb (offline, through SAELens' logger) and without any call of it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens import LoggingConfig
from wandb.proto.wandb_internal_pb2 import Record

from tests.tiny import tiny_hf, tiny_hooked, tiny_tokenizer
from tests.training.runs import BATCH, config, run, token_rows

STEPS = 47  # two sparsity windows of 23 and a step

TRAIN = """
import sys
from pathlib import Path
from tests.training.test_logging import train
train(Path(sys.argv[1]), log_to_wandb=True, eval_every=int(sys.argv[2]))
"""


def train(folder: Path, log_to_wandb: bool, eval_every: int = 1000) -> None:
    torch.set_num_threads(1)
    logger = LoggingConfig(
        log_to_wandb=log_to_wandb,
        wandb_project="a-test",
        wandb_log_frequency=5,
        eval_every_n_wandb_logs=eval_every,
    )
    cfg = config(folder, training_tokens=STEPS * BATCH, logger=logger, checkpoint_path=None)
    run(tiny_hooked(tiny_hf(), tiny_tokenizer(folder / "tokenizer")), cfg, token_rows())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "output" / "metrics.jsonl").read_text().splitlines()]


def offline_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB after a short header."""
    data, at, record = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no room for a record's header: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record = record * (kind in (3, 4)) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """What wandb wrote to disk for a run that was never online."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    history = []
    for data in offline_records(file):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return history


def train_offline(folder: Path, eval_every: int = 1000) -> Path:
    """A finished run that logged to an offline wandb."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
    }
    environment.pop("WANDB_API_KEY", None)
    script = [sys.executable, "-c", TRAIN, str(folder), str(eval_every)]
    done = subprocess.run(
        script, env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_offline(tmp_path_factory.mktemp("offline"))


def test_evaluations_are_logged(tmp_path: Path) -> None:
    """With a histogram of decoder norms, all of which are 1 ± 1e-7 where L0 is controlled."""
    history = {record["_step"]: record for record in offline_history(train_offline(tmp_path, 4))}
    for step in (19, 39):
        assert history[step]["metrics/explained_variance"] is not None
        assert history[step]["weights/W_dec_norms"]


def test_offline_wandb_holds_what_the_lines_hold(offline: Path) -> None:
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines(offline):
        by_step.setdefault(line.pop("step"), {}).update(line)
    assert sorted(by_step) == [4, 9, 14, 19, 23, 24, 29, 34, 39, 44, 46]
    history = {record["_step"]: record for record in offline_history(offline)}
    for step, metrics in by_step.items():
        for name, value in metrics.items():
            assert history[step][name] == pytest.approx(value, rel=1e-12), (step, name)
    assert set(history) == set(by_step)


def test_without_wandb_the_lines_are_the_same_and_wandb_is_not_called(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("wandb was called")

    for name in ("init", "log", "finish", "Histogram", "Artifact", "log_artifact"):
        monkeypatch.setattr(wandb, name, called)
    threads = torch.get_num_threads()
    train(tmp_path, log_to_wandb=False)
    torch.set_num_threads(threads)
    assert lines(tmp_path) == lines(offline)
    assert {"metrics/l0", "losses/mse_loss", "details/n_training_samples"} <= set(
        lines(tmp_path)[0]
    )
    assert not (tmp_path / "wandb").exists() and not Path("wandb").exists()
