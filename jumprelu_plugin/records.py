"""A result and where it came from: provenance, strict JSON on disk, short digests, whole folders.

Files and folders are whole or absent: they are written beside their place and renamed into it. JSON
is strict: NaN and infinities are an error that names the key, never a silent `NaN` token and never
a silent null. A quantity that does not exist is None, and whoever makes the record says so.

It does not decide what a result contains, and it draws nothing.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import stat
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DISTRIBUTIONS = (
    "jumprelu-plugin",
    "torch",
    "sae-lens",
    "transformer-lens",
    "transformers",
    "numpy",
)


def provenance(
    seed: int | None = None, model_digest: str | None = None, data_digest: str | None = None
) -> dict[str, Any]:
    """What a reader needs to repeat a result: versions, commit, hardware, time, seed, digests.

    `git` is None when the package does not run from a git checkout that tracks it. `time_utc` is
    ISO 8601. A package that is not installed as a distribution has version None.
    """
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "model_digest": model_digest,
        "data_digest": data_digest,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "git": _git(Path(__file__).resolve()),
        "hardware": {
            "cpu": _cpu_model(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(terse=True),
        },
    }


def write_json(path: str | Path, obj: Any) -> Path:
    """Write `obj` to `path` as strict JSON, indented, in one atomic step; parents are created.

    Dataclasses, paths, tensors and numpy values are written as the plain values they hold. Raises
    ValueError (and leaves any file already there as it was) for NaN or an infinity, naming the
    key, and TypeError for anything JSON has no form for.
    """
    return write_text(path, _strict_json(obj, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` in UTF-8, in one atomic step; parents are created.

    Of a link, what it points to is replaced. A device or a pipe takes the text as it comes.
    """
    given = Path(path)
    stream = given.is_relative_to("/dev") and not given.is_relative_to("/dev/shm")
    if stream or (given.exists() and not given.is_file()):
        given.write_text(text, encoding="utf-8")
        return given
    path = given.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return given


def append_jsonl(path: str | Path, obj: Any) -> Path:
    """Append `obj` as one line of strict JSON, in one write; parents are created.

    A last line that a crash left without its newline is ended first, so that it spoils itself and
    not this record. Raises as `write_json` does, before anything is written. Where the disk takes
    only a part of the line, the file is as it was and OSError is raised.
    """
    path = Path(path)
    line = (_strict_json(obj) + "\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is not JSON, or holds something else than an object; with its name.
        OSError: it cannot be opened.
    """
    require_file(path)
    return _json_object(Path(path).read_bytes(), str(path))


def require_file(path: str | Path) -> None:
    """Refuse what cannot be read to its end: a folder, a pipe, a device.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: there is something else than a file.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}, "
            "and a file is expected there"
        )


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; empty lines are left out.

    Raises:
        ValueError: a line is no JSON object; with its number. A process that was killed may leave
            half a line at the end.
        OSError: the file cannot be opened.
    """
    require_file(path)
    lines = Path(path).read_bytes().split(b"\n")
    return [
        _json_object(line, f"line {number} of {path}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


@contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Within the block, a ValueError that does not name `source` does."""
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def text_field(fields: Mapping[str, Any], name: str, where: str | Path) -> str | None:
    """A field that holds text; None where it is missing, null or empty.

    Raises:
        ValueError: it holds something else; `where` is the file's name.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} has {name} {value!r}; expected text")
    return value or None


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e308


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:  # of bytes that are no text, too
        raise ValueError(
            f"{where} is not JSON ({error}): it was cut off or changed. Copy it again from where "
            "it is whole"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a JSON {type(found).__name__}; expected an object")
    return found


@contextmanager
def whole_folder(
    path: str | Path, *, replaces: bool | Callable[[Path], bool] = False, kind: str = "folder"
) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path` when the block ends without an exception.

    After an exception `path` is as it was. Either way nothing is left beside it; a process that is
    killed leaves a folder whose name begins with a dot. Parents are created. What was written is on
    the disk before it has its name. Of a link, what it points to is replaced. The working directory
    and a mounted disk cannot give way: where empty, they are filled as by `whole_files`.

    Args:
        replaces: whether a folder already at `path` gives way: True, False, or a function that
            recognizes an earlier one of the same kind. An empty folder always does.
        kind: what the folder is, for the error message.

    Raises:
        ValueError: at once, if `path` is a file or a folder that does not give way.
    """
    _refuse_foreign(Path(path), replaces, kind)
    path = Path(path)
    if path.is_symlink() or path.name in ("", ".."):
        path = path.resolve()
    if path.is_dir() and (path.samefile(Path.cwd()) or path.is_mount()):
        if any(path.iterdir()):
            raise ValueError(
                f"{path} is not empty, and neither a working directory nor a mounted disk can be "
                "replaced: empty it, or give a folder in it"
            )
        with whole_files(path) as fresh:
            yield fresh
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True
    ) as beside:
        fresh = Path(beside, path.name)
        fresh.mkdir()
        yield fresh
        _sync(*fresh.rglob("*"), fresh)
        if path.exists():
            path.rename(Path(beside, "replaced"))
        fresh.rename(path)
        _sync(path.parent)


# Where `whole_files` writes, in the folder that it writes for.
UNFINISHED = ".unfinished"


def was_cut_short(folder: str | Path) -> bool:
    """Whether a process was killed while it wrote to `folder` with `whole_files`."""
    return Path(folder, UNFINISHED).is_dir()


@contextmanager
def whole_files(folder: str | Path, *, last: str | None = None) -> Iterator[Path]:
    """An empty folder to write into, whose entries then move into `folder`, beside what is there.

    They replace entries of the same name. `last` names the file by which others know that the
    result is there: it comes after all others. After an exception `folder` is as it was. One
    process at a time may write to a folder so.
    """
    folder = Path(folder)
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _sync(*unfinished.rglob("*"), unfinished)
        names = sorted(os.listdir(unfinished), key=lambda name: (name == last, name))
        for name in names:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (unfinished / name).replace(folder / name)
        _sync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk: a name that a power cut leaves has its data."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_foreign(path: Path, replaces: bool | Callable[[Path], bool], kind: str) -> None:
    if path.is_dir():
        gives_way = replaces(path) if callable(replaces) else replaces
        if not gives_way and any(path.iterdir()):
            raise ValueError(
                f"{path} is there and is not an earlier {kind}: give a folder that does not exist "
                "or is empty"
            )
    elif path.exists():
        raise ValueError(f"{path} is a file: give a folder to write into")


def _strict_json(obj: Any, indent: int | None = None) -> str:
    plain = _plain(obj, "")
    return json.dumps(plain, allow_nan=False, ensure_ascii=False, indent=indent)


def _plain(obj: Any, where: str) -> Any:
    """`obj` in JSON's own types; `where` is the key path, for the error message."""
    if obj is None or isinstance(obj, bool | str | int):
        return obj
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise ValueError(
                f"{where or 'The value'} is {obj}, which JSON cannot hold. Write None where the"
                " quantity does not exist, and find the fault where it should."
            )
        return obj
    if isinstance(obj, Mapping):
        return {_key(key, where): _plain(value, f"{where}.{key}".lstrip("."))
                for key, value in obj.items()}  # fmt: skip
    if isinstance(obj, list | tuple):
        return [_plain(value, f"{where}[{i}]") for i, value in enumerate(obj)]
    if isinstance(obj, PurePath):
        return str(obj)
    if isinstance(obj, Tensor | np.ndarray | np.generic):
        return _plain(obj.tolist(), where)
    if is_dataclass(obj) and not isinstance(obj, type):
        return _plain(asdict(obj), where)
    raise TypeError(
        f"{where or 'The value'} is a {type(obj).__name__}, which JSON has no form for."
        " Turn it into numbers, text, lists and mappings first."
    )


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    raise TypeError(f"{where or 'The record'} has the key {key!r}; JSON keys are text.")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git(file: Path) -> dict[str, Any] | None:
    # An installed copy may lie inside some other repository, whose commit would be a lie.
    if _run_git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _run_git(file, "rev-parse", "HEAD")
    changes = _run_git(file, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "modified": bool(changes)}


def _run_git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None
