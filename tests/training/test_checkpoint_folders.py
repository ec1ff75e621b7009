"""Checkpoints on disk: whole whatever the moment of a kill, and known when they are not."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jumprelu_plugin.training.checkpoints import (
    MANIFEST_FILENAME,
    Checkpoints,
    damage,
    disk_errors,
    newest_whole,
    numbered,
)
from jumprelu_plugin.training.metrics_file import append_metrics, keep_before

CONTENT = {"weights.bin": b"w" * 317, "state/optimizer.bin": b"o" * 211, "cfg.json": b"{}"}


def write(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- which are kept


def test_the_last_two_are_kept_and_all_that_were_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    for number in range(7):
        checkpoints.save(str(number), write, replaceable=number % 3 != 1)
    assert names(tmp_path / "run") == ["1", "4", "5", "6"]
    assert checkpoints.last == tmp_path / "run" / "6"
    assert [path.name for path in numbered(tmp_path / "run")] == ["1", "4", "5", "6"]
    checkpoints.remove_replaceable()
    assert names(tmp_path / "run") == ["1", "4"]
    only = Checkpoints(tmp_path / "other")
    only.save("11", write)
    only.remove_replaceable()
    assert not (tmp_path / "other").exists()


def test_one_that_was_given_up_does_not_count_among_the_two(tmp_path: Path) -> None:
    """The run went on from 20 because 30 was damaged: 20 must not be replaced by it."""
    checkpoints = Checkpoints(tmp_path)
    for number in (20, 30):
        checkpoints.save(str(number), write)
    (tmp_path / "30" / "weights.bin").write_bytes(b"")
    assert newest_whole(reversed(numbered(tmp_path))) == tmp_path / "20"
    Checkpoints(tmp_path).save("25", write)
    assert names(tmp_path) == ["20", "25"]


def test_checkpoints_are_due_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("jumprelu_plugin.training.checkpoints.time.monotonic", lambda: now)
    often, never = Checkpoints(tmp_path, every_n_minutes=1.5), Checkpoints(tmp_path)
    now += 89
    assert not often.due() and not never.due()
    now += 1
    assert often.due() and not never.due()
    often.save("7", write)
    assert not often.due()
    now += 90
    assert often.due()


# ---------------------------------------------------------------- damage


def test_flipped_bits_and_truncations_are_found(tmp_path: Path) -> None:
    (place,) = (Checkpoints(tmp_path).save("5", write),)
    assert place is not None and damage(place) is None
    draw = random.Random(3)
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) == len(CONTENT) + 1
    for path in files:
        content = path.read_bytes()
        # Of the manifest more: it is what the others are judged by.
        count = 307 if path.name == MANIFEST_FILENAME else 13
        for bit in draw.sample(range(8 * len(content)), count):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert damage(place) is not None, (path.name, bit)
        for length in draw.sample(range(len(content)), min(13, len(content))):
            path.write_bytes(content[:length])
            assert damage(place) is not None, (path.name, length)
        path.unlink()
        assert damage(place) == f"{path.relative_to(place)} is missing"
        path.write_bytes(content)
    (place / "more.bin").write_bytes(b"")
    assert damage(place) == "more.bin is not of it"


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": 3, "replaceable": true}', "[" * 100_000, "\0", "null"]
)
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, manifest: str) -> None:
    place = Checkpoints(tmp_path).save("5", write)
    assert place is not None
    (place / MANIFEST_FILENAME).write_text(manifest)
    assert damage(place) == f"{MANIFEST_FILENAME} does not hold what was written"


def test_the_one_before_a_damaged_one_is_used_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (90, 100):
        checkpoints.save(str(number), write)
    (tmp_path / "100" / "weights.bin").write_bytes(b"w" * 101)
    with caplog.at_level("WARNING"):
        assert newest_whole(reversed(numbered(tmp_path))) == tmp_path / "90"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "100 is damaged (weights.bin has 101 of 317 bytes): using the one before it" in line
    (tmp_path / "90" / "cfg.json").unlink()
    assert newest_whole(reversed(numbered(tmp_path))) is None


# ---------------------------------------------------------------- killed


def killed_at(event: int, folder: Path, act: Callable[[], Any]) -> bool:
    """Whether a process that does this is killed (SIGKILL) at its nth operation on the folder."""
    child = os.fork()
    if child == 0:
        left = event

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if name.startswith(("os.", "open", "shutil.")) and str(folder) in str(arguments):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the operations of writing, renaming and removing in turn, a process of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of use against power cuts alone, and slow
    for number in (10, 20):
        Checkpoints(tmp_path / "before").save(str(number), write)
    events = 0
    while True:
        folder = tmp_path / str(events)
        shutil.copytree(tmp_path / "before", folder)
        killed = killed_at(events, folder, lambda at=folder: Checkpoints(at).save("30", write))
        found = newest_whole(reversed(numbered(folder)))
        # What has a checkpoint's name is whole, and none is lost before the next is there.
        assert all(damage(path) is None for path in numbered(folder))
        assert found is not None and found.name in ("20", "30")
        Checkpoints(folder).save("40", write)
        assert names(folder) == [found.name, "40"]  # and nothing unfinished is left
        if not killed:
            break
        events += 1
    assert events > 40


# ---------------------------------------------------------------- the disk refuses


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_said_and_the_one_before_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refused(folder: Path) -> None:
        write(folder)
        raise error

    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save("1", refused) is None
    assert checkpoints.save("2", write) == tmp_path / "2"
    with caplog.at_level("WARNING"):
        assert checkpoints.save("3", refused) is None
    assert names(tmp_path) == ["2"] and damage(tmp_path / "2") is None
    said = caplog.records[-1].getMessage()
    assert "3 could not be saved" in said and f"{tmp_path / '2'}, is kept" in said


def test_other_errors_are_not_taken_for_the_disk_s(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA"):
        Checkpoints(tmp_path).save("1", fails)
    assert names(tmp_path) == []


def test_what_writes_tensors_raises_the_disk_s_error(tmp_path: Path) -> None:
    """Over a file, where a folder should be, no library can write."""
    (tmp_path / "file").write_text("")
    tensors = {"a": torch.ones(7)}
    for save in (torch.save, save_file):
        with pytest.raises(OSError), disk_errors():
            save(tensors, tmp_path / "file" / "x.bin")


def test_metrics_that_cannot_be_written_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "output" / "metrics.jsonl"
    append_metrics(path, {"step": 0})
    path.unlink()
    path.mkdir()
    with caplog.at_level("WARNING"):
        for step in (1, 2):
            append_metrics(path, {"step": step})
    assert len(caplog.records) == 1 and "metrics are not written" in caplog.text
    path.rmdir()
    append_metrics(path, {"step": 3})
    assert "is gone" in caplog.text and path.read_text() == '{"step": 3}\n'


def test_a_resumed_run_drops_the_lines_it_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"note": 1}\n{"step": 5, "a\n{"step": 5}\n{"step": 4}\n{"st')
    keep_before(path, 5)
    assert path.read_text() == '{"step": 3}\n{"note": 1}\n{"step": 4}\n'
    keep_before(tmp_path / "none.jsonl", 5)
