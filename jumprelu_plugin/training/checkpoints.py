"""The checkpoints of one run on disk: whole, checked before they are used, and few.

A checkpoint is a folder named by a number that grows. It is written beside its place, forced to the
disk and renamed, so that a process that is killed leaves it whole or not there. Its manifest has
the size and SHA-256 of every file: what a disk or a copy changed afterwards is found on resuming,
and the checkpoint before is used.

A checkpoint that cannot be written does not end a run: its state is in memory, and the checkpoint
before stays. What a checkpoint holds is its trainer's to write.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import logger
from safetensors import SafetensorError

from jumprelu_plugin.records import whole_folder

MANIFEST_FILENAME = "checkpoint_manifest.json"
DEFAULT_MINUTES = 10.0
# Of the replaceable checkpoints, the newest and the one before it, for when the newest is damaged.
KEPT = 2
# How PyTorch's writer says that the disk refused it; it raises RuntimeError.
_TORCH_REFUSALS = ("PytorchStreamWriter", "iostream error", "Parent directory", "unexpected pos")


class Checkpoints:
    """Saves a run's checkpoints and removes those that later ones replace.

    Args:
        folder: what they are saved in; made with the first.
        every_n_minutes: how often `due` says so; 0 for never.
        prepare: called before each is saved, to make again what has to be beside `folder`.

    Attributes:
        last: the last that was saved, or that the run was resumed from.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_minutes: float = 0.0,
        prepare: Callable[[], Any] | None = None,
    ):
        self.folder, self.every_n_minutes, self._prepare = Path(folder), every_n_minutes, prepare
        self.last: Path | None = None
        self._tried = time.monotonic()

    def due(self) -> bool:
        """Whether `every_n_minutes` have passed since the last one, or since the beginning."""
        seconds = 60 * self.every_n_minutes
        return seconds > 0 and time.monotonic() - self._tried >= seconds

    def save(
        self, name: str, write: Callable[[Path], Any], *, replaceable: bool = True
    ) -> Path | None:
        """Save a checkpoint in one piece; None, and a warning, where the disk refuses it.

        Args:
            name: of its folder.
            write: writes the files into the folder that it is given.
            replaceable: whether later checkpoints replace it; the last two such are kept.
        """
        place = self.folder / name
        try:
            if self._prepare is not None:
                self._prepare()
            with disk_errors(), whole_folder(place, replaces=True) as unfinished:
                write(unfinished)
                write_manifest(unfinished, replaceable=replaceable)
        except OSError as error:
            logger.warning(f"{place} could not be saved: {error}. {self._remedy()}")
            return None
        finally:
            self._tried = time.monotonic()
        self.last = place
        if replaceable:
            self._remove_replaced(place)
        return place

    def remove_replaceable(self) -> None:
        """Remove all that nobody asked to keep: when the run is finished and its result saved."""
        _remove([*_replaceable(self.folder), *_unfinished(self.folder)])
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove_replaced(self, newest: Path) -> None:
        older = [path for path in _replaceable(self.folder) if _number(path) < _number(newest)]
        kept = {newest, *older[len(older) - (KEPT - 1) :]}
        # One with a greater number was given up: the run went on from one before it.
        replaced = [path for path in _replaceable(self.folder) if path not in kept]
        _remove([*replaced, *_unfinished(self.folder)])

    def _remedy(self) -> str:
        if self.last is None:
            before = "There is no checkpoint before it"
        elif self.last.is_dir():
            before = f"The one before it, {self.last}, is kept"
        else:
            before = f"The one before it, {self.last}, is gone"
        return f"{before}. Training goes on: make room, or make {self.folder} writable"


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    found = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=_number)


def newest_whole(checkpoints: Iterable[Path]) -> Path | None:
    """The first that is as it was written; those before it are said to be damaged.

    Args:
        checkpoints: the newest first.
    """
    for checkpoint in checkpoints:
        why = damage(checkpoint)
        if why is None:
            return checkpoint
        logger.warning(f"the checkpoint {checkpoint} is damaged ({why}): using the one before it")
    return None


def write_manifest(folder: Path, *, replaceable: bool) -> None:
    """Add a manifest of a folder's files to it."""
    (folder / MANIFEST_FILENAME).write_text(_manifest(_files(folder), replaceable))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is as it was written."""
    try:
        text = (checkpoint / MANIFEST_FILENAME).read_text()
        manifest = json.loads(text)
        recorded, replaceable = manifest["files"], manifest["replaceable"]
        found = _files(checkpoint)
        for name in sorted({*recorded, *found}):
            if name not in found:
                return f"{name} is missing"
            if name not in recorded:
                return f"{name} is not of it"
            size, expected = found[name]["bytes"], recorded[name]["bytes"]
            if size != expected:
                return f"{name} has {size:,} of {expected:,} bytes"
            if found[name] != recorded[name]:
                return f"{name} does not hold what was written"
        if text == _manifest(found, replaceable):
            return None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return f"{MANIFEST_FILENAME} does not hold what was written"


def is_as_written(checkpoint: Path, name: str) -> bool:
    """Whether one file of a checkpoint holds what was written; True where no manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILENAME).read_text())
        return manifest["files"][name] == _size_and_digest(checkpoint / name)
    except FileNotFoundError:
        return not (checkpoint / MANIFEST_FILENAME).exists()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def refuse_negative_minutes(minutes: float) -> None:
    """Raise ValueError for an interval below 0."""
    if not minutes >= 0:
        raise ValueError(
            f"checkpoint_every_n_minutes is {minutes:g}; give a number of minutes, or 0 for none"
        )


def refuse_unwritable(folder: str | Path | None, name: str) -> None:
    """Raise ValueError if a folder of this name cannot be made or written to."""
    if folder is None:
        return
    there = Path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{name} is {folder}, and {there} is not a folder: give another {name}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} is {folder}, and {there} cannot be written to: make it writable, or give "
            f"another {name}"
        )


@contextmanager
def disk_errors() -> Iterator[None]:
    """Have PyTorch and safetensors raise OSError, as Python does, for a file they cannot write."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if any(text in str(error) for text in _TORCH_REFUSALS):
            raise OSError(f"PyTorch could not write a file: {error}") from error
        raise


@contextmanager
def explained_at_the_end(output: str | Path, last: Path | None, remedy: str) -> Iterator[None]:
    """Have an OSError say that what is lost is the result, and how to get it."""
    try:
        with disk_errors():
            yield
    except OSError as error:
        from_there = "from the beginning" if last is None else f"from {last}"
        raise OSError(
            f"training is finished, but its result could not be written to {output}: {error}. Make "
            f"room or make it writable, and give {remedy}: it goes on {from_there}"
        ) from error


# ---------------------------------------------------------------- files


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name) if checkpoint.name.isdecimal() else -1


def _replaceable(folder: Path) -> list[Path]:
    return [path for path in numbered(folder) if _is_replaceable(path)]


def _is_replaceable(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILENAME).read_text())
        return manifest["replaceable"] is True
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _unfinished(folder: Path) -> list[Path]:
    """What processes that were killed left."""
    return [path for path in folder.glob(".[0-9]*-*") if path.is_dir()]


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            hidden = folder
            if not folder.name.startswith("."):
                # First out of sight, so that a checkpoint is never there in part.
                hidden = folder.rename(folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}"))
            shutil.rmtree(hidden)
        except OSError as error:
            logger.warning(f"{folder} could not be removed: {error}")


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by its path in it, without the manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_FILENAME:
            found[name] = _size_and_digest(path)
    return found


def _size_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        state = hashlib.sha256()
        while part := file.read(1 << 20):
            state.update(part)
        return {"bytes": file.tell(), "sha256": state.hexdigest()}


def _manifest(files: dict[str, Any], replaceable: bool) -> str:
    return json.dumps({"files": files, "replaceable": replaceable}, indent=1, sort_keys=True) + "\n"
