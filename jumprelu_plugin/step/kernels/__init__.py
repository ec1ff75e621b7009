"""The sparse step in Triton: the verbs of `Pattern` and `select` as kernels for a GPU.

Each kernel computes what a plain routine of `step/` computes, in float32, and is tested against it.

    screening.py   the pairs that could exceed the edge: a float16 product, one bit a pair
    compaction.py  the pairs themselves, from those bits, in order and without a sort
    products.py    inner products at pairs; weighted sums by token or by latent
    estimators.py  JumpReLU and the step at pairs, and their straight-through estimators
    prefixes.py    decoding with Matryoshka prefixes, and its gradients
    rows.py        unit decoder rows and tangential gradients
    pattern.py     these behind the interface of `Pattern`
    buffers.py     how many pairs a step has room for
    selection.py   `select` with them, in such buffers
    entries.py     `SparseEntries` in such buffers, and the check that nothing was left out

The plain step asks the device how many pairs it found, and waits for the answer, before it can
allocate memory for them. Here that memory is allocated beforehand, and how much was needed is
copied to the host while the device goes on (`entries.py`).

Triton is optional (`pip install jumprelu-plugin[gpu]`, or PyTorch's CUDA builds, which bring it).
Without a GPU the kernels run in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before
Triton is imported.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets kernels in Python instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: Triton is installed, and it is a GPU or interpreted."""
    return _installed() and (device.type == "cuda" or interpreted())


def require_available(device: torch.device) -> None:
    """Raise ValueError, with what to do, where the kernels do not run on `device`."""
    if available(device):
        return
    missing = (
        f"they need a CUDA device, and the SAE is on {device}"
        if _installed()
        else "Triton is not installed: pip install 'jumprelu-plugin[gpu]'"
    )
    raise ValueError(
        f"step_kernel is 'triton', but these kernels cannot run here ({missing}); or choose "
        "step_kernel='auto', which takes the fastest path there is"
    )
