"""What is free in the heap goes back to the system before a large allocation, and only then."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.heap import LARGE_BYTES, make_room

BLOCK = 2**20
HELD_APART = 61


@pytest.fixture
def pinned() -> list[Tensor]:
    """61 MB of free blocks, each kept from the others and from the heap's end by one in use."""
    # As a step does at its start: glibc then keeps blocks of up to 32 MB in the heap.
    del_me = torch.ones(LARGE_BYTES // 4 - 8192)
    del del_me
    blocks = [torch.ones(BLOCK // 4) for _ in range(2 * HELD_APART)]
    return blocks[::2]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")
def test_free_memory_goes_back_before_a_large_allocation(pinned: list[Tensor]) -> None:
    before = resident_bytes()
    make_room(LARGE_BYTES - 1)
    assert resident_bytes() > before - BLOCK
    make_room(LARGE_BYTES)
    assert resident_bytes() < before - 0.8 * HELD_APART * BLOCK
    assert all(bool((block == 1).all()) for block in pinned)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from jumprelu_plugin.step import heap

    def no_such_library(name: object) -> object:
        raise OSError(f"{name}: not found")

    monkeypatch.setattr(heap.ctypes, "CDLL", no_such_library)
    heap._trim.cache_clear()
    make_room(2 * LARGE_BYTES)
    heap._trim.cache_clear()
