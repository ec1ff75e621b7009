"""The values that processes exchange in a step, and their gradients.

The processes of a row of the mesh read the same tokens and hold their own latents. Those of a
column hold the same latents and read their own tokens. In a step they exchange

    in a row        x̂, [tokens, d_out], once, and once more for each Matryoshka prefix; scalars: L0
                    and the density penalty
    in a column     gradients (`gradients.py`); how often each latent is active; losses; the norm of
                    each token, where outliers are limited
    over all        the slopes of L0 and penalty along all thresholds, λ's measurement, the
                    gradient's norm, the count of active pairs

The gradient of a sum over shards is the same for each of them, so no activation travels back.

Gradients become ready in an order that may differ from process to process (each chooses its own
step kernel). What a backward pass has to exchange therefore waits in `after_backward` until all
gradients are there, and travels in one piece; so do the slopes, which nobody needs before. Where
several dictionaries train in one step, a backward pass goes through one after the other, the last
first, whatever their kernels: each waits in its turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.step.activity import firings_by_latent
from jumprelu_plugin.step.processes import OneProcess
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.mesh import Mesh


class ManyProcesses(OneProcess):
    """The processes of a run, each with a shard of one dictionary and a part of each batch.

    Args:
        layout: which latents the shards hold.
        mesh: the processes.
    """

    def __init__(self, layout: LatentLayout, mesh: Mesh):
        self.layout, self.mesh = layout, mesh
        self.replicas, self.shard = mesh.data_parallel_size, mesh.shard
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    # ---------------------------------------------------------------- latents

    @override
    def held(self, d_sae: int) -> int:
        return self.layout.held

    @override
    def sum_over_shards(self, partial: Tensor) -> Tensor:
        if self.layout.shards == 1:
            return partial
        return _Exchanged.apply(partial, self.mesh.latents.sum_in_place)  # type: ignore[return-value]

    @override
    def count_over_shards(self, count: float | Tensor) -> float:
        return float(self.mesh.latents.sum_in_place(_countable(count)))

    @override
    def mean_over_shards(self, values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        both = torch.stack([values.sum(dtype=torch.float64), values.new_tensor(values.numel())])
        total, count = self.mesh.latents.sum_in_place(both).unbind()
        return (total / count).to(values)

    @override
    def max_over_shards(self, values: Tensor) -> Tensor:
        return self.mesh.latents.max_in_place(_without_bool(values).clone())

    @override
    def gather_latents(self, values: Tensor) -> Tensor:
        parts = self.mesh.latents.gather(_without_bool(values))
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
        overall = self.mesh.latents.sum_in_place(mean.clone()) / shards
        squares = variance * (count - 1) + count * (mean - overall).square()
        total = self.mesh.latents.sum_in_place(squares)
        return float((total / (count * shards - 1)).sqrt())

    # ---------------------------------------------------------------- tokens

    @override
    def mean_over_replicas(self, values: Tensor) -> Tensor:
        if self.replicas == 1:
            return values

        def average(own: Tensor) -> Tensor:
            return self.mesh.tokens.sum_in_place(own).div_(self.replicas)

        return _Exchanged.apply(values, average)  # type: ignore[return-value]

    @override
    def gather_tokens(self, values: Float[Tensor, "tokens ..."]) -> Float[Tensor, "batch ..."]:
        return values if self.replicas == 1 else torch.cat(self.mesh.tokens.gather(values))

    @override
    def firings_of_batch(
        self, feature_acts: Float[Tensor, "tokens held"]
    ) -> Int[Tensor, " held"] | None:
        if self.replicas == 1:
            return None
        return self.mesh.tokens.sum_in_place(firings_by_latent(feature_acts).int())

    @override
    def any_over_replicas(self, flags: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return flags if self.replicas == 1 else self.mesh.tokens.max_in_place(flags.byte()).bool()

    # ---------------------------------------------------------------- both

    @override
    def count_pairs(self, count: float | Tensor) -> float:
        return float(self.mesh.all.sum_in_place(_countable(count)))

    @override
    def sum_counts(self, counts: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        return self.mesh.all.sum_in_place(counts)

    @override
    def total(self, partial: Tensor) -> Tensor:
        return self.mesh.all.sum_in_place(partial.detach().clone()).div_(self.replicas)

    @override
    def after_backward(self, partial: Tensor, use: Callable[[Tensor], None]) -> None:
        self._waiting.append((partial.detach(), use))

    def begin_step(self) -> None:
        """Forget what a step left that had no backward pass."""
        self._waiting.clear()

    def finish_backward(self) -> None:
        """Sum what waits in `after_backward`, in one piece, and hand each sum to its user."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            totals = self.total(torch.stack([value for value, _ in waiting]))
            for total, (value, use) in zip(totals, waiting, strict=True):
                use(total.to(value.dtype))


class _Exchanged(torch.autograd.Function):
    """A value that is exchanged in place; every summand's gradient is that of the result.

    Where shards sum, each computes the same from the sum. Where replicas average, their gradients
    are averaged later (`step.processes`).
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, exchange: Callable[[Tensor], Tensor]) -> Tensor:
        return exchange(partial.clone(memory_format=torch.contiguous_format))

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


def _countable(count: float | Tensor) -> Float[Tensor, ""]:
    """A count as a tensor of its own that the processes can add up."""
    if isinstance(count, Tensor):
        return count.detach().to(torch.float64, copy=True)
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
    return torch.tensor(count, dtype=torch.float64, device=device)


def _without_bool(values: Tensor) -> Tensor:
    return values.byte() if values.dtype == torch.bool else values
