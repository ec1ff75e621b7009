"""The values that the processes of a training exchange, and how many bytes that is.

Every process of a model-parallel group reads the same tokens and holds its own latents. In a step
they exchange

    forward     x̂, [batch, d_out], once, and once more for each Matryoshka prefix
    scalars     L0, the sparsity term, their slopes along all thresholds, λ's measurement, the
                gradient's norm
    backward    the gradient of b_dec, [d_in], where the encoder subtracts it

The gradient of a sum over shards is the same for each of them, so no activation travels back.

Gradients become ready in an order that may differ from process to process (each chooses its own
step kernel). What a backward pass has to exchange therefore waits in `after_backward` until all
gradients are there, and travels in one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.step.processes import OneProcess
from jumprelu_plugin.training.distributed.layout import LatentLayout


class ManyProcesses(OneProcess):
    """The processes of one model-parallel group, each with a shard of one dictionary.

    Args:
        layout: which latents each of them holds.
        group: theirs, as many as the layout has shards; None: all processes.

    Attributes:
        shard: this process's number in the group.
        traffic: bytes handed to collective operations since the start, by operation; what a
            network carries of an all-reduce is up to twice that (`2 (M - 1)/M`, by ring).
    """

    def __init__(self, layout: LatentLayout, group: Any = None):
        self.layout, self.group = layout, group
        self.shard = dist.get_rank(group)
        self.traffic: Counter[str] = Counter()
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def __deepcopy__(self, memo: Any) -> ManyProcesses:
        return self  # a copied dictionary is held by the same processes

    @override
    def held(self, d_sae: int) -> int:
        return self.layout.held

    @override
    def sum_over_shards(self, partial: Tensor) -> Tensor:
        return _SumOverShards.apply(partial, self)  # type: ignore[return-value]

    def sum_in_place(self, values: Tensor) -> Tensor:
        """The sum over shards, written over `values`, without a gradient."""
        return self._reduced(values, dist.ReduceOp.SUM)

    @override
    def count_over_shards(self, count: float | Tensor) -> float:
        value = torch.as_tensor(count, dtype=torch.float64, device=self._device(count))
        return float(self.sum_in_place(value.clone()))

    @override
    def mean_over_shards(self, values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        both = torch.stack([values.sum(dtype=torch.float64), values.new_tensor(values.numel())])
        total, count = self.sum_in_place(both).unbind()
        return (total / count).to(values)

    @override
    def median_over_shards(
        self, values: Float[Tensor, " held"], where: Bool[Tensor, " held"]
    ) -> Float[Tensor, ""]:
        return self.gather_latents(values.masked_fill(~where, torch.nan)).nanmedian()

    @override
    def max_over_shards(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self._reduced(values.clone(), dist.ReduceOp.MAX)

    @override
    def any_over_shards(self, flag: Bool[Tensor, ""]) -> bool:
        return bool(self.max_over_shards(flag.float()))

    @override
    def gather_latents(self, values: Tensor) -> Tensor:
        sent = values.to(torch.uint8) if values.dtype == torch.bool else values.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.layout.shards)]
        self.traffic["all_gather"] += sent.nbytes
        dist.all_gather(parts, sent, group=self.group)
        return self.layout.join(parts).to(values.dtype)

    @override
    def part_of(self, values: Tensor) -> Tensor:
        return self.layout.part(values, self.shard)

    @override
    def own(self, latents: Int[Tensor, " n"]) -> tuple[Int[Tensor, " own"], Int[Tensor, " own"]]:
        places = latents.new_full((self.layout.d_sae,), -1)
        order = torch.arange(self.layout.d_sae, device=latents.device)
        mine = self.part_of(order)
        places[mine] = torch.arange(len(mine), device=latents.device)
        found = places[latents]
        of_these = (found >= 0).nonzero().flatten()
        return of_these, found[of_these]

    @override
    def std(self, values: Float[Tensor, "batch held"]) -> float:
        variance, mean = (value.double() for value in torch.var_mean(values))
        shards, count = self.layout.shards, values.numel()
        overall = self.sum_in_place(mean.clone()) / shards
        squares = variance * (count - 1) + count * (mean - overall).square()
        return float((self.sum_in_place(squares) / (count * shards - 1)).sqrt())

    @override
    def after_backward(self, partial: Tensor, use: Callable[[Tensor], None]) -> None:
        self._waiting.append((partial.detach(), use))

    def finish_backward(self) -> None:
        """Sum what waits in `after_backward`, in one piece, and hand each sum to its user."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            totals = self.sum_in_place(torch.stack([value for value, _ in waiting]))
            for total, (value, use) in zip(totals, waiting, strict=True):
                use(total.to(value.dtype))

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        self.traffic["all_reduce"] += values.nbytes
        dist.all_reduce(values, op=operation, group=self.group)
        return values

    def _device(self, like: float | Tensor) -> torch.device:
        if isinstance(like, Tensor):
            return like.device
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


class _SumOverShards(torch.autograd.Function):
    """Every process computes the same from the sum, so the gradient of each summand is its own."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, processes: ManyProcesses) -> Tensor:
        return processes.sum_in_place(partial.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class ShareOfGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of shards.

    For a parameter that all shards hold and that is read both by what they share and by what is
    theirs: the sum of its gradients over the shards is then the gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, shards: int) -> Tensor:
        ctx.shards = shards
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.shards, None
