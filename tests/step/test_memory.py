"""The sparse step keeps nothing of [batch, d_sae] for the backward pass."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from tests.step.problems import BATCH, D_SAE, encode, loss_of, problem


def tensors_kept(path: str) -> tuple[list[int], list[int]]:
    """Sizes saved for backward by the path's own pass, and sizes alive after the forward pass."""
    p = problem("some latents never")
    leaves = p.leaves()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(encode(path, p, leaves, chunk=3 * D_SAE), p, leaves)
    alive = [o.numel() for o in gc.get_objects() if type(o) is Tensor and o.layout is torch.strided]
    loss.backward()
    return saved, alive


def test_nothing_as_large_as_batch_times_dictionary_outlives_the_forward_pass() -> None:
    gc.collect()
    saved, alive = tensors_kept("sparse")
    assert saved and BATCH * D_SAE not in saved
    assert alive.count(BATCH * D_SAE) == 0


def test_the_memory_test_would_see_a_dense_step() -> None:
    assert BATCH * D_SAE in tensors_kept("dense")[0]
