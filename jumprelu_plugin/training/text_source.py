"""The text of a run: what `dataset_path` names, read without SAELens' detours through the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from jumprelu_plugin.models.sequences import written_by_save_to_disk


def local_dataset(path: str, *, streaming: bool) -> Any:
    """The training split of a folder: of text, pretokenized, or written by `save_to_disk`.

    None where `path` is no folder: SAELens then reads it from the hub.

    Raises:
        ValueError: the folder holds no dataset, or no training split.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    if written_by_save_to_disk(folder):
        return one_split(load_from_disk(folder), path)
    try:
        return load_dataset(path, split="train", streaming=streaming)
    except StopIteration:  # from an empty file
        return []
    except Exception as error:  # datasets raises many kinds
        raise ValueError(
            f"dataset_path is {path}, a folder that datasets cannot read ({error}): give one with "
            "text, JSON or parquet files, or one that save_to_disk wrote"
        ) from error


def one_split(dataset: Any, name: str = "override_dataset") -> Any:
    """The dataset, or a DatasetDict's training split.

    Raises:
        ValueError: a DatasetDict without one.
    """
    if not isinstance(dataset, DatasetDict):
        return dataset
    splits = [str(split) for split in dataset]
    if "train" not in splits:
        raise ValueError(
            f"{name} holds the splits {', '.join(splits)}, and none is called train: give one of "
            f"them, such as dataset[{splits[0]!r}]"
        )
    return dataset["train"]


@contextmanager
def without_remote_code_errors() -> Iterator[None]:
    """Without the errors that `datasets` logs of an argument SAELens passes to every dataset."""

    def keep(record: logging.LogRecord) -> bool:
        return "trust_remote_code" not in record.getMessage()

    loggers = [logging.getLogger(name) for name in ("datasets.load", "datasets.builder")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
