"""Whether a result can be written, asked before it is computed."""

from __future__ import annotations

from pathlib import Path


def require_place_for_file(path: str | Path, example: str) -> None:
    """Check, before a long computation, that its result can be written to the file `path`.

    Args:
        example: a file's name, for the message.

    Raises:
        ValueError: `path` is a folder, or lies below a file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file to write, such as {path / example}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(
            f"{path} cannot be written, because {above} is a file: give a file to write in a folder"
        )
