"""Reads damaged and hostile files with every reader, and counts what it does with them.

    python -m benchmarks.fuzz                     # 10,000 inputs a reader, adds to the records
    python -m benchmarks.fuzz --inputs 200        # a minute
    python -m benchmarks.fuzz --reader saelens --first 4711 --inputs 1    # one input again

An input is a whole folder in which one file or two were damaged (`fuzz_inputs.py`). A reader may
read it, where nothing that it needs was changed, or refuse it: with a ValueError that names a file
of the folder, or an OSError that does. Anything else is a fault: another exception, code run by an
unpickler, a file outside the folder changed, or more memory taken than `MEMORY`.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

import jumprelu_plugin
from benchmarks.fuzz_inputs import damage, fresh_copy
from benchmarks.fuzz_readers import READERS, Reader
from benchmarks.tables import RESULTS, terminal
from jumprelu_plugin.formats.reading import NoDictionaryError
from jumprelu_plugin.records import append_jsonl, provenance

# The inputs are files of less than a megabyte.
LONGEST = 20
PACKAGE = str(Path(jumprelu_plugin.__file__).parent)
MEMORY = 128_000_000
# Of a mistake in the package, where something else then named it as if it were the file's.
_MISTAKES = (AttributeError, TypeError, IndexError, AssertionError, NameError, ZeroDivisionError)


@dataclass
class Outcomes:
    """What a reader did with its inputs.

    Attributes:
        read, refused: how many.
        faults: by input number, what was done to the files and what came of it.
    """

    read: int = 0
    refused: int = 0
    faults: dict[int, str] = field(default_factory=dict)


def fuzz(name: str, inputs: Iterable[int], folder: Path) -> Outcomes:
    """Read `inputs`, which their numbers determine, in an empty `folder`."""
    reader, outcomes = READERS[name], Outcomes()
    whole, sandbox, mark = folder / "whole", folder / "sandbox", folder / "mark"
    whole.mkdir()
    write_whole(reader, whole)
    reader.read(whole)  # whatever is loaded on a first call is not an input's memory
    for number in inputs:
        rng = random.Random(f"{name} {number}")
        given = sandbox / "given"
        fresh_copy(whole, given)
        done = damage(given, rng, mark)
        fault = read_one(reader, given, outcomes)
        if mark.exists():
            fault = "code in the file was run"
            mark.unlink()
        if sorted(path.name for path in folder.iterdir()) != ["sandbox", "whole"]:
            fault = "a file outside the folder was written"
        if fault is not None:
            outcomes.faults[number] = f"{done}: {fault}"
    return outcomes


def write_whole(reader: Reader, folder: Path) -> None:
    """A whole folder for the reader, in place of an empty one."""
    folder.rmdir()
    made = folder.parent / "made"
    made.mkdir()
    target = made / "folder"
    target.mkdir()
    reader.write(target)
    target.rename(folder)
    shutil.rmtree(made)


def read_one(reader: Reader, folder: Path, outcomes: Outcomes) -> str | None:
    """Read, count, and say what went wrong if it did."""
    try:
        with limited_memory(MEMORY), limited_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except Exception as error:
        fault = judge(error, folder)
        outcomes.refused += fault is None
        return fault
    outcomes.read += 1
    return None


def judge(error: Exception, folder: Path) -> str | None:
    """None for a refusal that a user can act on, else what the exception is."""
    shown = f"{type(error).__name__}: {str(error)[:300]}"
    shown += f" ({':'.join(map(str, _place(error)))})"
    if type(error) not in (ValueError, NoDictionaryError) and not isinstance(error, OSError):
        return shown
    named = error.filename if isinstance(error, OSError) and error.filename else str(error)
    if str(folder) not in str(named):
        return f"names no file: {shown}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate" in str(cause):
            return f"took more than {MEMORY:,} bytes: {shown}"
        if isinstance(cause, _MISTAKES) and _place(cause)[0].startswith(PACKAGE):
            return f"from {type(cause).__name__}: {shown}"
        cause = cause.__cause__
    return None


class _Hangs(Exception):
    pass


@contextmanager
def limited_time() -> Iterator[None]:
    """Within the block `_Hangs` is raised after `LONGEST` seconds, as when a pipe is waited for."""

    def stop(*_: object) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> tuple[str, int | None]:
    """The file and the line that it was raised in."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].filename, frames[-1].lineno) if frames else ("nowhere", None)


@contextmanager
def limited_memory(bytes_more: int) -> Iterator[None]:
    """Within the block the process cannot take more memory than this on top of what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(
    inputs: Annotated[int, typer.Option(help="Inputs for each reader.")] = 10_000,
    reader: Annotated[list[str] | None, typer.Option(help="Readers; all by default.")] = None,
    first: Annotated[int, typer.Option(help="Number of the first input.")] = 0,
    output: Annotated[Path, typer.Option(help="File of records to add to.")] = RESULTS
    / "fuzz.jsonl",
) -> None:
    unknown = [name for name in reader or () if name not in READERS]
    if unknown:
        raise typer.BadParameter(
            f"there is no reader {', '.join(unknown)}; known: {', '.join(READERS)}",
            param_hint="--reader",
        )
    torch.set_num_threads(1)
    console, faults = terminal(), 0
    for name in reader or READERS:
        start = time.perf_counter()
        with TemporaryDirectory(prefix="fuzz-") as folder:
            numbers = range(first, first + inputs)
            found = fuzz(name, numbers, Path(folder))
        for number, fault in found.faults.items():
            console.print(f"[red]{name} {number}[/] {fault}", highlight=False, markup=True)
        faults += len(found.faults)
        append_jsonl(
            output,
            {
                "kind": "fuzz",
                "reader": name,
                "inputs": inputs,
                "first": first,
                "read": found.read,
                "refused": found.refused,
                "faults": len(found.faults),
                "memory_limit_bytes": MEMORY,
                "seconds": round(time.perf_counter() - start, 1),
                "provenance": provenance(),
            },
        )
        console.print(
            f"{name}: {found.read} read, {found.refused} refused, {len(found.faults)} faults"
        )
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
