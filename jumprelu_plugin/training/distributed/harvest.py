"""One harvest for all processes: each runs the model on its share of every batch of text.

SAELens' store reads `store_batch_size_prompts` sequences and runs the model on them. Here every
process reads them all, runs the model on a part, and gets the others' activations. So every process
has the same rows in the same order, mixes them alike, and serves the batches that one process
serves; a checkpoint's mixing buffer is one process's too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from jumprelu_plugin.training.distributed.division import share_of_pass
from jumprelu_plugin.training.distributed.launch import Launch


class SharedHarvest:
    """What the processes of a run exchange while they draw activations.

    Args:
        launch: these processes.

    Attributes:
        sent: bytes of activations that this process handed to the others.
    """

    def __init__(self, launch: Launch):
        self._launch, self.sent = launch, 0

    def share(self, store: ActivationsStore) -> None:
        """From now on have this store run the model on this process's share alone."""
        # Methods of SAELens' store, by which it draws for one hook and for several.
        for name in ("get_activations", "get_multi_hook_activations"):
            setattr(store, name, self._of_all(getattr(store, name)))

    def _of_all(self, harvest: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def of_all(tokens: Int[Tensor, "sequences positions"]) -> Any:
            count, (rank, size) = len(tokens), (self._launch.rank, self._launch.size)
            share = share_of_pass(count, size)
            # The last shares may be shorter; then the last sequence fills them up.
            own = torch.arange(rank * share, (rank + 1) * share).clamp_max(count - 1)
            found = harvest(tokens[own.to(tokens.device)])
            if isinstance(found, dict):
                return {hook: self._gathered(values)[:count] for hook, values in found.items()}
            return self._gathered(found)[:count]

        return of_all

    def _gathered(self, values: Tensor) -> Tensor:
        own = values.contiguous()
        parts = [torch.empty_like(own) for _ in range(self._launch.size)]
        self.sent += own.nbytes
        # NCCL exchanges what lies on GPUs alone.
        dist.all_gather(parts, own, group=None if own.is_cuda else self._launch.objects)
        return torch.cat(parts)
