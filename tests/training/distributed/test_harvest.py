"""Activations that processes draw together are those that one draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from jumprelu_plugin.training.distributed.harvest import SharedHarvest
from jumprelu_plugin.training.distributed.launch import Launch
from jumprelu_plugin.training.distributed.mesh import Mesh
from tests.training.distributed.processes import grouped, run_on

SIZE, SEQUENCES, POSITIONS, D_IN = 3, 7, 5, 11


def activations(tokens: Tensor) -> Tensor:
    return tokens[:, :, None] * torch.arange(D_IN) + 0.5


@grouped
def drawn_together(tokens: Tensor) -> Any:
    """What a store gives on one of the processes; sequences the model saw; bytes sent."""
    rank = torch.distributed.get_rank()
    harvest = SharedHarvest(Launch(rank, SIZE, rank, None, None, Mesh(SIZE, 1)))
    seen: list[int] = []

    def one_hook(own: Tensor) -> Tensor:
        seen.append(len(own))
        return activations(own)

    store: Any = SimpleNamespace(
        get_activations=one_hook,
        get_multi_hook_activations=lambda own: {"a": one_hook(own), "b": 2 * activations(own)},
    )
    harvest.share(store)
    found = store.get_activations(tokens)
    sent = harvest.sent
    return found, store.get_multi_hook_activations(tokens), seen, sent


def test_each_process_runs_the_model_on_its_share(tmp_path: Path) -> None:
    tokens = torch.randint(53, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(0))
    share = 3  # of 7 sequences, rounded up
    for found, both, seen, sent in run_on(SIZE, drawn_together, tmp_path, tokens):
        assert torch.equal(found, activations(tokens))
        assert torch.equal(both["a"], activations(tokens))
        assert torch.equal(both["b"], 2 * activations(tokens))
        assert seen == [share, share]
        assert sent == 4 * share * POSITIONS * D_IN


def test_more_processes_than_sequences(tmp_path: Path) -> None:
    tokens = torch.tensor([[4, 9, 2, 7, 8], [1, 0, 5, 6, 3]])
    for found, *_ in run_on(SIZE, drawn_together, tmp_path, tokens):
        assert torch.equal(found, activations(tokens))
