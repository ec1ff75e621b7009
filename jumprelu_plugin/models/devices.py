"""Checks of devices: that one exists, before anything is loaded on it, and that two are one."""

from __future__ import annotations

import torch


def require_device(name: str) -> None:
    """Check that PyTorch can compute on a device of this name.

    Raises:
        ValueError: it cannot.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; give cpu, cuda, cuda:1 or mps") from error
    if device.type not in ("cpu", "cuda", "mps") and not _is_there(device.type):
        raise ValueError(
            f"device is {name!r}, and this PyTorch cannot compute on one: give cpu, cuda, cuda:1 "
            "or mps"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, and PyTorch finds no CUDA device here: give device cpu, or "
            "install a PyTorch built for this machine's GPU"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, and there are {torch.cuda.device_count()} CUDA devices, numbered "
            "from 0"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {name!r}, and PyTorch finds no MPS device here: give cpu")


def same_device(one: str | torch.device, other: str | torch.device) -> bool:
    """Whether two names are one device; without a number it is the first of its kind."""
    one, other = torch.device(one), torch.device(other)
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def _is_there(kind: str) -> bool:
    """Whether PyTorch's module for another kind of accelerator finds one; `meta` has none."""
    found = getattr(getattr(torch, kind, None), "is_available", None)
    return found is not None and found()
