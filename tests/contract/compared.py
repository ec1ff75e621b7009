"""Compares what a test computed with this package and without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differences(name: str, found: Any, expected: Any, tolerance: float) -> list[str]:
    """The places where two values differ.

    Args:
        name: of the value.
        found: with the package; numbers, text, tensors, and lists and dicts of them.
        expected: without it.
        tolerance: the largest difference, relative to the largest entry; 0 means the same bits.
    """
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return [f"{name}: {sorted(found.keys() ^ expected.keys())} in one of them"]
        return [
            text
            for key, value in expected.items()
            for text in differences(f"{name}.{key}", found[key], value, tolerance)
        ]
    if not tolerance:
        equal = torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
        return [] if equal else [f"{name}: {found} with the package, {expected} without"]
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        return [f"{name}: {tuple(found.shape)} with the package, {tuple(expected.shape)} without"]
    largest = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return [] if largest <= tolerance else [f"{name}: relative difference {largest:.2e}"]
