"""Token sequences for training and for evaluation, from the `demo` extra's text or a dataset."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.text import tokenized_dataset

HELD_OUT_SPLITS = ("test", "validation")
DEFAULT_CONTEXT_SIZE = 128


def fitting_context(model: Any, context_size: int | None = None) -> int:
    """The length of the sequences that a model is given: the given one, else 128 or what it takes.

    Raises:
        ValueError: the given one is longer than the model takes.
    """
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if context_size is None:
        return min(DEFAULT_CONTEXT_SIZE, longest or DEFAULT_CONTEXT_SIZE)
    if longest is not None and context_size > longest:
        raise ValueError(
            f"context_size is {context_size}, but the model takes at most {longest} tokens: set "
            f"context_size={longest} or less"
        )
    return context_size


def read_sequences(
    model: Any,
    dataset_path: str = "",
    *,
    context_size: int,
    held_out: int,
    train: int = 0,
    prepend_bos: bool = True,
    sequence_separator_token: int | str | None = "bos",
    disable_concat_sequences: bool = False,
    seed: int | None = None,
) -> tuple[Int[Tensor, "train context"], Int[Tensor, "held_out context"]]:
    """Up to `train` training sequences and up to `held_out` other sequences, for evaluation.

    The text of the `demo` extra has a training and a test part. From another dataset, held-out
    sequences are those of its split "test" or "validation"; without such a split, they are its
    first sequences, and the training sequences follow them.

    Args:
        model: a hooked model with its tokenizer.
        dataset_path: a dataset of text or tokens that SAELens can read; empty for the text of the
            `demo` extra.
        context_size: tokens in a sequence.
        held_out, train: the largest numbers of sequences.
        prepend_bos: whether every sequence starts with the BOS token.
        sequence_separator_token, disable_concat_sequences: how documents of a dataset of text
            become sequences, as in SAELens.
        seed: shuffles the demo extra's sequences; None keeps their order.

    Raises:
        ValueError: the text is shorter than one sequence, the separator is no token, or a row of
            tokenized text is short or of another model.
        OSError: the dataset does not exist.
    """
    if not dataset_path:
        fit = _demo_text(model, "train", context_size, train, prepend_bos, seed)
        return fit, _demo_text(model, "test", context_size, held_out, prepend_bos, seed)
    _require_separator(sequence_separator_token)
    splits = _Splits(dataset_path)
    how = {
        "prepend_bos": prepend_bos,
        "sequence_separator_token": sequence_separator_token,
        "disable_concat_sequences": disable_concat_sequences,
    }
    skip = held_out if splits.held_out is None else 0
    fit = _dataset(model, splits, "train", context_size, train, how, skip)
    return fit, _dataset(model, splits, splits.held_out or "train", context_size, held_out, how)


def held_out_beside(
    model: Any,
    dataset_path: str,
    text_digest: str,
    n_sequences: int,
    *,
    context_size: int,
    held_out: int,
    prepend_bos: bool = True,
) -> Int[Tensor, "held_out context"]:
    """Up to `held_out` sequences for evaluation that are not among those trained on.

    Of a dataset without a split for evaluation, they are the first sequences where the text that
    was trained on follows them, as `read_sequences` reads it, and those after that text where it
    is the dataset's beginning, as `jumprelu cache-activations` reads it.

    Args:
        model, dataset_path, context_size, held_out, prepend_bos: as in `read_sequences`.
        text_digest: `models.digest` of the sequences trained on.
        n_sequences: their number.

    Raises:
        ValueError: the text that was trained on is not found, or nothing follows it.
        OSError: the dataset does not exist.
    """
    if not dataset_path:
        return _demo_text(model, "test", context_size, held_out, prepend_bos, None)
    splits, how = _Splits(dataset_path), {"prepend_bos": prepend_bos}
    if (split := splits.held_out) is not None:
        return _dataset(model, splits, split, context_size, held_out, how)
    rows = _dataset(model, splits, "train", context_size, n_sequences + held_out, how)
    if digest(rows[held_out:]) == text_digest:
        return rows[:held_out]
    if digest(rows[:n_sequences]) != text_digest:
        raise ValueError(
            f"{dataset_path!r} has no split named {' or '.join(HELD_OUT_SPLITS)}, and its first "
            f"{n_sequences:,} sequences are not those that were trained on: what was held out "
            "cannot be told. Give the dataset such a split"
        )
    if len(rows) <= n_sequences:
        raise ValueError(
            f"all {len(rows):,} sequences of {dataset_path!r} were trained on, and none is left to "
            "evaluate on: train on fewer, or give the dataset a split named test"
        )
    return rows[n_sequences:]


def _require_separator(token: Any) -> None:
    if token is not None and token not in ("bos", "eos", "sep") and type(token) is not int:
        raise ValueError(
            f"sequence_separator_token is {token!r}; expected bos, eos, sep, a token's number or "
            "null"
        )


def written_by_save_to_disk(folder: str | Path) -> bool:
    """Whether `datasets` wrote the folder with `save_to_disk`, which `load_dataset` cannot read."""
    return any(Path(folder, name).is_file() for name in ("dataset_dict.json", "state.json"))


def text_at(path: str) -> str:
    """What `datasets` takes for a dataset_path: a hub name, or a folder's whole path.

    `datasets` has readers of its own, named text, json, csv, ..., and prefers them to a folder of
    that name: they read every such file below the current folder.

    Raises:
        ValueError: it is a file.
    """
    place = Path(path)
    if place.is_file():
        raise ValueError(
            f"dataset_path is {path}, a file, and a folder is expected: give {place.parent}, where "
            "it holds no other text"
        )
    return str(place.absolute()) if place.is_dir() else path


def require_row(row: Int[Tensor, " positions"], name: str, context_size: int, model: Any) -> None:
    """Raise ValueError for a row of tokenized text that is too short, or of another model.

    Args:
        row: its tokens, `context_size` of them at most.
        name: of the row, for the message.
        context_size: how many a row has.
        model: a hooked model.
    """
    if len(row) < context_size:
        raise ValueError(
            f"{name} has {len(row)} tokens, fewer than context_size {context_size}: drop such "
            "rows, or tokenize the text with documents joined"
        )
    vocabulary = getattr(getattr(model, "cfg", None), "d_vocab", None)
    least, most = (int(end) for end in row.aminmax())
    if vocabulary is not None and not 0 <= least <= most < vocabulary:
        raise ValueError(
            f"{name} holds tokens {least} to {most}, and the model has {vocabulary} tokens: it was "
            "tokenized for another model"
        )


class _Splits:
    """The splits of a dataset on the hub, in a folder of texts, or written by `save_to_disk`."""

    def __init__(self, path: str) -> None:
        import datasets

        self.path, self._loaded = text_at(path), None
        if written_by_save_to_disk(path):
            found = datasets.load_from_disk(path)
            self._loaded = found if isinstance(found, datasets.DatasetDict) else {"train": found}
            self.names = [str(name) for name in self._loaded]
        else:
            self.names = datasets.get_dataset_split_names(self.path)

    @property
    def held_out(self) -> str | None:
        """The split for evaluation, if there is one."""
        return next((split for split in HELD_OUT_SPLITS if split in self.names), None)

    def read(self, split: str) -> Any:
        """The dataset of one split.

        Raises:
            ValueError: there is no such split.
        """
        from datasets import load_dataset

        if split not in self.names:
            raise ValueError(
                f"{self.path} holds the splits {', '.join(self.names)}, and {split!r} is needed: "
                "rename one of them, or give another dataset_path"
            )
        if self._loaded is not None:
            return self._loaded[split]
        return load_dataset(self.path, split=split, streaming=True)


def _demo_text(
    model: Any, split: Any, context_size: int, count: int, prepend_bos: bool, seed: int | None
) -> Tensor:
    if count < 1:
        return torch.empty(0, context_size, dtype=torch.long)
    rows = tokenized_dataset(model.tokenizer, context_size, split, prepend_bos=prepend_bos)
    if seed is not None:
        rows = rows.shuffle(seed)
    return torch.tensor(rows[:count]["tokens"])


def _dataset(
    model: Any,
    splits: _Splits,
    split: str,
    context_size: int,
    count: int,
    how: dict[str, Any],
    skip: int = 0,
) -> Tensor:
    from sae_lens.training.activations_store import ActivationsStore

    if count < 1:
        return torch.empty(0, context_size, dtype=torch.long)
    with warnings.catch_warnings():
        # SAELens advises to tokenize a text beforehand, which is for long trainings.
        warnings.filterwarnings("ignore", "Dataset is not tokenized")
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # SAELens' reader does
        # Only its reader of text is used, which runs no model, so hook and width have no effect.
        store = ActivationsStore(
            model=model,
            dataset=splits.read(split),
            streaming=True,
            hook_name="",
            hook_head_index=None,
            context_size=context_size,
            d_in=1,
            n_batches_in_buffer=1,
            total_training_tokens=1,
            store_batch_size_prompts=1,
            train_batch_size_tokens=1,
            **how,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
        sequences: list[Tensor] = []
        try:
            while len(sequences) < skip + count:
                sequences.append(store.get_batch_tokens(1, True, False))
                if store.is_dataset_tokenized:
                    name = f"row {len(sequences) - 1} of the split {split!r} of {splits.path!r}"
                    require_row(sequences[-1][0], name, context_size, model)
        except StopIteration:
            pass
    if len(sequences) <= skip:
        raise ValueError(
            f"the split {split!r} of {splits.path!r} holds {len(sequences)} sequences of "
            f"{context_size} tokens, and more than {skip} are needed: give a longer text or a "
            "smaller context_size"
        )
    return torch.cat(sequences[skip:]).long()
