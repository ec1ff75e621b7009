"""A digest of tensors and text, by which the same text or weights are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_DIGEST_CHARACTERS = 16


def digest(*items: Tensor | bytes | str | Mapping[str, Tensor] | Iterable[Any]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over tensors, bytes, text or nests of them.

    A tensor counts with its dtype, shape and exact bits; a mapping in the order of its keys. The
    device a tensor is on does not matter. Raises TypeError for anything else.
    """
    state = hashlib.sha256()
    for item in items:
        _feed(state, item)
    return state.hexdigest()[:_DIGEST_CHARACTERS]


def _feed(state: Any, item: Any) -> None:
    if isinstance(item, Tensor):
        plain = item.detach().cpu().contiguous()
        state.update(f"tensor {plain.dtype} {tuple(plain.shape)}:".encode())
        state.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(item, str | bytes):
        raw = item.encode("utf-8") if isinstance(item, str) else item
        state.update(f"{type(item).__name__} {len(raw)}:".encode())
        state.update(raw)
    elif isinstance(item, Mapping):
        state.update(f"mapping {len(item)}:".encode())
        for key in sorted(item):
            _feed(state, key)
            _feed(state, item[key])
    elif isinstance(item, list | tuple):
        state.update(f"sequence {len(item)}:".encode())
        for part in item:
            _feed(state, part)
    else:
        raise TypeError(
            f"digest takes tensors, bytes, text, and mappings or sequences of them;"
            f" got {type(item).__name__}."
        )
