"""The text of a run: what `dataset_path` names, read without SAELens' detours through the hub."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset, load_from_disk
from sae_lens import logger
from sae_lens.training.activations_store import ActivationsStore

from jumprelu_plugin.models.sequences import require_row, text_at, written_by_save_to_disk


def local_dataset(path: str, *, streaming: bool) -> Any:
    """The training split of a folder: of text, pretokenized, or written by `save_to_disk`.

    None where `path` is no folder: SAELens then reads it from the hub.

    Raises:
        ValueError: the folder holds no dataset, or no training split; or `path` is a file, or the
            whole path of a folder that does not exist.
    """
    place, folder = text_at(path), Path(path)
    if not folder.is_dir() and folder.is_absolute():
        raise ValueError(
            f"dataset_path is {path}, and there is no such folder: give a folder with text or "
            "tokens, or a hub name"
        )
    if not folder.is_dir():
        return None
    if written_by_save_to_disk(folder):
        return one_split(load_from_disk(folder), path)
    try:
        return load_dataset(place, split="train", streaming=streaming)
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


def refuse_unread_fields(cfg: Any, store: ActivationsStore) -> None:
    """Raise ValueError for a field that says how text becomes rows where the rows are given, as
    those of the demo extra's text are; warn where they begin in another way than `prepend_bos`.

    Args:
        cfg: SAELens' runner config.
        store: the store that it made, of a text whose first row can be read.
    """
    if store.dataset is None:
        return
    if not store.is_dataset_tokenized:
        _refuse_separator_of_another_model(cfg.sequence_separator_token, store.model)
        return
    for name, default in (("disable_concat_sequences", False), ("sequence_separator_token", "bos")):
        value = getattr(cfg, name)
        if value != default:
            raise ValueError(
                f"{name} is {value!r}, and the text is tokenized already: its rows are taken as "
                f"they are. Give a dataset of text, or set it to {default!r}"
            )
    first: Any = next(iter(store.dataset))
    row = torch.as_tensor(first[store.tokens_column])[: cfg.context_size]
    require_row(row, "the first row of the tokenized text", cfg.context_size, store.model)
    bos = getattr(getattr(store.model, "tokenizer", None), "bos_token_id", None)
    if bos is not None and (row[0] == bos) != cfg.prepend_bos:
        logger.warning(
            f"prepend_bos is {cfg.prepend_bos}, and the first row of the tokenized text begins "
            f"{'without' if cfg.prepend_bos else 'with'} BOS: rows are taken as they are; set "
            f"prepend_bos={not cfg.prepend_bos}, so that the SAE is judged on what it reads"
        )


def _refuse_separator_of_another_model(token: Any, model: Any) -> None:
    size = getattr(getattr(model, "cfg", None), "d_vocab", None)
    if type(token) is int and size is not None and not 0 <= token < size:
        raise ValueError(
            f"sequence_separator_token is {token}, and the model has {size} tokens: give one of "
            "its own, or bos, eos or sep"
        )


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """Without what SAELens' reading of text makes others say, or says, of every dataset.

    `datasets` logs errors of an argument that SAELens passes to it; PyTorch warns of the way in
    which it copies tokens; and it compares a dataset's rows with the run's tokens.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "trust_remote_code" not in record.getMessage()

    loggers = [logging.getLogger(name) for name in ("datasets.load", "datasets.builder")]
    for each in loggers:
        each.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The training dataset contains fewer samples")
            warnings.filterwarnings("ignore", "To copy construct from a tensor")
            yield
    finally:
        for each in loggers:
            each.removeFilter(keep)
