"""Sequences of tokens to fit on and to evaluate on, from the `demo` extra's text or any dataset."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jumprelu_plugin.models.text import tokenized_dataset

HELD_OUT_SPLITS = ("test", "validation")


def read_sequences(
    model: Any,
    dataset_path: str = "",
    *,
    context_size: int,
    held_out: int,
    train: int = 0,
    prepend_bos: bool = True,
    seed: int | None = None,
) -> tuple[Int[Tensor, "train context"], Int[Tensor, "held_out context"]]:
    """Up to `train` and `held_out` sequences of `context_size` tokens; no sequence is in both.

    The text of the `demo` extra (an empty `dataset_path`) has a training and a held-out part. Of
    another dataset the held-out sequences are from its split "test" or "validation"; where it has
    neither, they are its first sequences, and the training sequences follow them.

    Args:
        model: a hooked model with its tokenizer.
        dataset_path: a dataset of text or tokens, as SAELens reads it.
        prepend_bos: whether every sequence begins with the BOS token.
        seed: the demo extra's sequences are shuffled with it; None takes them in order.

    Raises:
        ValueError: there is no sequence of this length.
        OSError: there is no such dataset.
    """
    if not dataset_path:
        fit = _demo_text(model, "train", context_size, train, prepend_bos, seed)
        return fit, _demo_text(model, "test", context_size, held_out, prepend_bos, seed)
    import datasets

    splits = datasets.get_dataset_split_names(dataset_path)
    judged = next((split for split in HELD_OUT_SPLITS if split in splits), "train")
    skip = held_out if judged == "train" else 0
    fit = _dataset(model, dataset_path, "train", context_size, train, prepend_bos, skip)
    return fit, _dataset(model, dataset_path, judged, context_size, held_out, prepend_bos)


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
    path: str,
    split: str,
    context_size: int,
    count: int,
    prepend_bos: bool,
    skip: int = 0,
) -> Tensor:
    from datasets import load_dataset
    from sae_lens.training.activations_store import ActivationsStore

    if count < 1:
        return torch.empty(0, context_size, dtype=torch.long)
    # Only its reader of text is used: it runs no model, so hook and width do not matter.
    store = ActivationsStore(
        model=model,
        dataset=load_dataset(path, split=split, streaming=True),
        streaming=True,
        hook_name="",
        hook_head_index=None,
        context_size=context_size,
        d_in=1,
        n_batches_in_buffer=1,
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=1,
        prepend_bos=prepend_bos,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    sequences: list[Tensor] = []
    try:
        while len(sequences) < skip + count:
            sequences.append(store.get_batch_tokens(1, True, False))
    except StopIteration:
        pass
    if len(sequences) <= skip:
        raise ValueError(
            f"the split {split!r} of {path!r} holds {len(sequences)} sequences of {context_size} "
            f"tokens, and more than {skip} are needed: give a longer text or a smaller context_size"
        )
    return torch.cat(sequences[skip:]).long()
