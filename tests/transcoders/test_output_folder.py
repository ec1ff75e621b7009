"""Two runs in one output folder; and a run's folder on a full disk or removed under it."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from jumprelu_plugin.records import read_json
from jumprelu_plugin.training.checkpoints import damage
from jumprelu_plugin.training.distributed.launch import joined
from jumprelu_plugin.transcoders.output_folder import (
    SETTINGS_FILENAME,
    checkpoints_of,
    held,
    held_by_the_first,
)
from jumprelu_plugin.transcoders.per_layer.dealing import DealtCheckpoints
from jumprelu_plugin.transcoders.settings import TranscoderSettings
from tests.training.distributed.processes import run_on


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "output"
    with held(folder):
        with pytest.raises(ValueError, match="another run is going on in .*output"), held(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()  # nothing was written to it
    with held(folder):
        (folder / "result").touch()
    assert (folder / "result").exists()


def hold_until_killed(folder: Path, holds: Any) -> None:
    with held(folder):
        holds.set()
        multiprocessing.Event().wait()


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    holds = context.Event()
    process = context.Process(target=hold_until_killed, args=(tmp_path, holds))
    process.start()
    assert holds.wait(60)
    with pytest.raises(ValueError, match="another run is going on"), held(tmp_path):
        pass
    process.kill()
    process.join()
    with held(tmp_path):
        pass


def held_together(folder: Path) -> str:
    try:
        with joined(1, 2, "cpu") as launch, held_by_the_first(launch, folder):
            return "held"
    except (ValueError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def test_the_first_of_several_processes_holds_it_for_all(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    assert run_on(2, held_together, tmp_path / "free", folder) == ["held"] * 2
    with held(folder):
        first, second = run_on(2, held_together, tmp_path / "taken", folder)
    assert first.startswith("ValueError: another run is going on") and "SystemExit" in second


def save_where_one_disk_is_full(folder: Path) -> list[Any]:
    """What saving two checkpoints gives, the first on a disk that is full for one process."""
    with joined(1, 2, "cpu") as launch:
        kind = partial(DealtCheckpoints, launch)
        checkpoints = checkpoints_of(folder, TranscoderSettings(training_tokens=1009), kind)

        def write(place: Path, full: bool) -> None:
            (place / f"layer_{launch.rank}").mkdir()
            if full and launch.rank == 1:
                raise SafetensorError("No space left on device")

        return [checkpoints.save(str(n), partial(write, full=n == 7)) for n in (7, 13)]


def test_a_checkpoint_that_one_process_cannot_write_ends_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    for saved in run_on(2, save_where_one_disk_is_full, tmp_path / "results", folder):
        assert saved == [None, folder / "checkpoints" / "13"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["13"]
    assert damage(folder / "checkpoints" / "13") is None
    # What names the run in its folder was gone, and is there again: the command can go on.
    assert read_json(folder / SETTINGS_FILENAME)["training_tokens"] == 1009
