"""The output folder of a long run: one that stopped goes on in it, any other is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sae_lens import logger

from jumprelu_plugin.records import read_json, write_json
from jumprelu_plugin.training.checkpoints import (
    Checkpoints,
    newest_whole,
    numbered,
    refuse_unwritable,
)
from jumprelu_plugin.training.distributed.launch import Launch

CheckpointsT = TypeVar("CheckpointsT", bound=Checkpoints)

SETTINGS_FILENAME = "unfinished.json"
CHECKPOINTS = "checkpoints"
METRICS_FILENAME = "metrics.jsonl"
# Settings that change nothing of what is trained.
_FREE = ("n_checkpoints", "checkpoint_every_n_minutes", "device")


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Keep the runs of other processes out of a folder.

    It is made if it is missing, and removed again if nothing was written to it. The kernel holds
    the lock, so a killed process leaves none. On a file system without locks, nobody is kept out.

    Raises:
        ValueError: another process holds it, or it cannot be written to.
    """
    refuse_unwritable(output, "output_path")
    output.mkdir(parents=True, exist_ok=True)
    folder = os.open(output, os.O_RDONLY)
    try:
        _lock(folder, output)
        try:
            yield
        finally:
            with suppress(OSError):  # it holds something
                output.rmdir()
    finally:
        os.close(folder)


@contextmanager
def held_by_the_first(launch: Launch, output: Path) -> Iterator[None]:
    """The same, by the first of several processes, and for all of them."""
    with ExitStack() as stack:
        launch.from_the_first(lambda: stack.enter_context(held(output)))
        yield


def claim_output_folder(output: Path, settings: Any, record_filename: str) -> Path | None:
    """The newest whole checkpoint of an unfinished run in `output`; None to start fresh.

    A damaged checkpoint is said in a line, and the one before it is taken.

    Args:
        output: it may be missing or empty; nothing is written to it here.
        settings: a dataclass; an unfinished run in `output` must have been started with the same.
        record_filename: the file that a finished run leaves in `output`.

    Raises:
        ValueError: `output` holds a finished run, a run with other settings, or other files, or it
            cannot be written to.
    """
    refuse_unwritable(output, "output_path")
    if (output / record_filename).exists():
        finish_output_folder(output)  # where the run was killed after it wrote its record
        raise ValueError(
            f"{output} already holds finished transcoders ({record_filename}); give another folder"
        )
    started = output / SETTINGS_FILENAME
    if not started.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no unfinished run; give another")
        return None
    # A setting that the version which started the run did not have is at its default.
    before = {**_plain(type(settings)()), **read_json(started)}
    now = _plain(settings)
    different = [n for n in before if n not in _FREE and before[n] != now.get(n)]
    if different:
        name = different[0]
        raise ValueError(
            f"{output} holds an unfinished run with {name}={before[name]!r}, and {name} is "
            f"{now.get(name)!r} now: give the same settings to continue it, or another folder"
        )
    saved = numbered(output / CHECKPOINTS)
    newest = newest_whole(reversed(saved))
    if newest is None:
        if saved:
            logger.warning(f"no checkpoint in {output / CHECKPOINTS} is whole: starting fresh")
        (output / METRICS_FILENAME).unlink(missing_ok=True)
    else:
        logger.warning(f"resuming from {newest}")
    return newest


def start_output_folder(output: Path, settings: Any) -> None:
    """Say in the folder what runs in it, so that the same call can continue it."""
    write_json(output / SETTINGS_FILENAME, settings)


def checkpoints_of(
    output: Path, settings: Any, kind: Callable[..., CheckpointsT] = Checkpoints
) -> CheckpointsT:
    """Where a run that was started in `output` saves its checkpoints.

    Args:
        kind: makes them, with the arguments of `Checkpoints`.
    """

    def prepare() -> None:
        if not (output / SETTINGS_FILENAME).exists():
            logger.warning(f"what was in {output} is gone; training goes on and saves there anew")
            start_output_folder(output, settings)

    return kind(output / CHECKPOINTS, settings.checkpoint_every_n_minutes, prepare)


def finish_output_folder(output: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    (output / SETTINGS_FILENAME).unlink(missing_ok=True)


def _lock(folder: int, output: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is going on in {output}: wait for it or stop it, or give another folder"
        ) from None
    except OSError:
        pass  # a file system without locks


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))
