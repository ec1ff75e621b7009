"""The part of the activations that a dictionary was trained on, as its metadata records it."""

from __future__ import annotations

from typing import Any


def sae_heads(sae: Any) -> tuple[int | None, int | None]:
    """The heads an SAE reads and writes, by its metadata's `hook_head_index`; None for all.

    A transcoder of one head's input writes to the whole output hook.
    """
    metadata = sae.cfg.metadata
    head, hook_out = metadata.hook_head_index, metadata.hook_name_out
    return head, head if hook_out in (None, metadata.hook_name) else None


def trained_positions(sae: Any) -> slice:
    """The positions of a sequence, by its metadata's `seqpos_slice`.

    Raises:
        ValueError: it is no slice.
    """
    given = sae.cfg.metadata.seqpos_slice
    try:
        part = slice(*(given or (None,)))
        part.indices(0)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the dictionary's metadata has seqpos_slice {given!r}; expected start, stop and step, "
            "each a whole number or null"
        ) from error
    return part


def excluded_tokens(sae: Any) -> set[int]:
    """The token ids that its metadata lists in `exclude_special_tokens`; none where it is a flag.

    The flag means the tokenizer's special tokens, which no evaluation counts.
    """
    listed = sae.cfg.metadata.exclude_special_tokens
    return set(listed) if isinstance(listed, list | tuple) else set()
