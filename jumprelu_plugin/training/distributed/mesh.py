"""The processes of a run as a grid, one row a replica: who shares tokens and who shares latents.

    rank = replica · model_parallel_size + shard

The processes of a row hold one dictionary between them, each its latents, and read the same tokens.
Those of a column hold the same latents, and split each batch. Rows are neighboring ranks, so that
what is exchanged for every token stays on one machine where it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class Group:
    """Some of a run's processes, which exchange tensors; a group of one exchanges nothing.

    Args:
        name: under which `traffic` counts the bytes that this process hands over.
        size: how many processes these are.
        handle: PyTorch's; None: all processes.
        traffic: bytes so far, by group. What a network carries of a sum is up to twice that
            (`2 (N - 1)/N`, by ring).
    """

    def __init__(self, name: str, size: int, handle: Any, traffic: Counter[str]):
        self.name, self.size, self.handle, self.traffic = name, size, handle, traffic

    def sum_in_place(self, values: Tensor) -> Tensor:
        """The sum over the group, written over `values`."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max_in_place(self, values: Tensor) -> Tensor:
        """The elementwise maximum over the group, written over `values`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def start_sum(self, values: Tensor) -> Callable[[], Any]:
        """Start `sum_in_place` beside what is computed meanwhile; call what is returned to wait."""
        if self.size == 1:
            return lambda: None
        self.traffic[self.name] += values.nbytes
        work = dist.all_reduce(values, group=self.handle, async_op=True)
        assert work is not None
        return work.wait

    def gather(self, values: Tensor) -> list[Tensor]:
        """What every process has, all of one shape, in the order of their ranks."""
        if self.size == 1:
            return [values]
        sent = values.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        self.traffic[self.name] += sent.nbytes
        dist.all_gather(parts, sent, group=self.handle)
        return parts

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            self.traffic[self.name] += values.nbytes
            dist.all_reduce(values, op=operation, group=self.handle)
        return values


class Mesh:
    """The grid of all processes; every one of them makes it, inside `torch.distributed`'s group.

    Args:
        data_parallel_size: replicas, over which batches are split.
        model_parallel_size: shards of each, over which the latents are split.

    Attributes:
        replica, shard: this process's place in the grid.
        latents: the processes that hold this one's replica.
        tokens: those that hold the same latents.
        all: every process.
        traffic: bytes handed over since the start, by the name of the group; `send` is what
            travels to the first process for a checkpoint.
    """

    def __init__(self, data_parallel_size: int, model_parallel_size: int):
        self.data_parallel_size = data_parallel_size
        self.model_parallel_size = model_parallel_size
        self.replica, self.shard = divmod(dist.get_rank(), model_parallel_size)
        self.traffic: Counter[str] = Counter()
        ranks = torch.arange(data_parallel_size * model_parallel_size)
        grid = ranks.view(data_parallel_size, model_parallel_size)
        rows = _handle(grid)
        columns = _handle(grid.t())
        self.latents = Group("latents", model_parallel_size, rows, self.traffic)
        self.tokens = Group("tokens", data_parallel_size, columns, self.traffic)
        self.all = Group("all", len(ranks), None, self.traffic)

    def tokens_of(self, batch: Float[Tensor, "batch ..."]) -> Float[Tensor, "tokens ..."]:
        """This process's part of a batch that every process has."""
        return batch.chunk(self.data_parallel_size)[self.replica]


def _handle(groups: Tensor) -> Any:
    """PyTorch's handle of this process's group, one of the rows; None where it is all processes."""
    if len(groups) == 1:
        return None
    made = [dist.new_group(ranks) for ranks in groups.tolist()]  # by all processes, in one order
    (place,) = (groups == dist.get_rank()).any(1).nonzero().flatten().tolist()
    return made[place]
