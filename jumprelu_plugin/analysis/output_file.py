"""Whether a result can be written, asked before it is computed."""

from __future__ import annotations

from pathlib import Path

from jumprelu_plugin.records import read_json


def require_place_for_file(path: str | Path, example: str) -> None:
    """Check, before a long computation, that its result can be written to the file `path`.

    Args:
        example: a file's name, for the message.

    Raises:
        ValueError: `path` is a folder, lies below a file, or is a file that is no earlier result.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file to write, such as {path / example}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(
            f"{path} cannot be written, because {above} is a file: give a file to write in a folder"
        )
    if path.is_file() and not _is_earlier_result(path, Path(example).suffix):
        raise ValueError(
            f"{path} is there and is not an earlier {example}: give another name, so that it is "
            "not lost"
        )


def _is_earlier_result(path: Path, suffix: str) -> bool:
    """Whether a file is empty, a page, or a record with its provenance."""
    if not path.stat().st_size:
        return True
    try:
        if suffix == ".html":
            with path.open(encoding="utf-8") as page:
                return page.readline().strip().lower() == "<!doctype html>"
        return "provenance" in read_json(path)
    except ValueError:  # not text, or no JSON
        return False
