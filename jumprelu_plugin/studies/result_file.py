"""Reads the results of an interpretability study back from its record."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.records import read_json

Result = TypeVar("Result")


def read_result(path: str | Path, kind: str, result_class: type[Result]) -> Result:
    """What `result` holds in a record, as the dataclass that was written.

    Args:
        path: the record.
        kind: what the record says it is.
        result_class: a dataclass; its fields are checked against their types.

    Raises:
        ValueError: the file is not JSON, is of another kind, or lacks a field.
        FileNotFoundError: there is no such file.
        ImportError: the `studies` extra is not installed.
    """
    pydantic = require_extra("pydantic", "studies")
    record = read_json(path)
    if record.get("kind") != kind:
        raise ValueError(f"{path} holds a record of kind {record.get('kind')!r}; expected {kind!r}")
    try:
        return pydantic.TypeAdapter(result_class).validate_python(record.get("result"))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("result", *first["loc"])))
        raise ValueError(f"{path} is not whole: {where}: {first['msg']}") from None
