"""The gradients of one step: of the whole dictionary, over the whole batch, their norm clipped.

Replicas average their gradients. Each matrix is one all-reduce, in place, that starts as soon as
its gradient is there and runs while the backward pass computes the next one: W_dec's, which is half
of all bytes, while the encoder's is computed. That one is the last, and the sum of the vectors
follows it. Processes may find their gradients in another order, so each starts them in one.

No gradient is divided by the number of replicas: the pass that clips the norm does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jumprelu_plugin.saes.first_batch import full_precision
from jumprelu_plugin.training.distributed.processes import ManyProcesses

# SAELens' trainer clips the gradient's norm at this, of all parameters together.
MAX_GRADIENT_NORM = 1.0
# The order in which a backward pass finds the gradients of a dictionary's matrices.
BACKWARD_ORDER = ("W_dec", "W_skip", "W_enc")


class Gradients:
    """Makes of every process's gradients those of the training.

    Args:
        parameters: by name, as their optimizer sees them.
        matrices: the names of those with two axes, in the order in which a backward pass finds
            their gradients.
        split: those that are split over the shards; every shard has all of the others.
        summed: those whose gradient, in a shard, is of this shard's latents alone, though every
            shard has all of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: Sequence[str],
        split: frozenset[str],
        summed: frozenset[str],
        processes: ManyProcesses,
    ):
        self.parameters, self.processes = dict(parameters), processes
        self._split, self._summed = split, summed
        self._matrices = list(matrices)
        self._ready: set[str] = set()
        self._started: list[Callable[[], Any]] = []
        self.finished = True

    def listen(self) -> None:
        """Take part in every backward pass from now on; after other hooks, which change them."""
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._found(name))

    def begin(self) -> None:
        """Expect the gradients of a new step."""
        self._ready.clear()
        self._started.clear()
        self.processes.begin_step()
        self.finished = False

    def _found(self, name: str) -> None:
        self._ready.add(name)
        if self.processes.replicas > 1:
            for matrix in self._matrices[len(self._started) :]:
                if matrix not in self._ready:
                    break
                sum_over = self.processes.mesh.tokens.start_sum
                self._started.append(sum_over(_contiguous(self._gradient(matrix))))
        if len(self._ready) == len(self.parameters):
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """Wait for the sums, and clip their norm.

        SAELens' trainer clips each process's own norm afterwards, which is then below the bound.
        """
        if self.processes.replicas > 1:
            self._sum_vectors()
        for wait in self._started:
            wait()
        for name in self._summed:
            self.processes.mesh.latents.sum_in_place(self._gradient(name))
        squares = {name: _square(self._gradient(name)) for name in self.parameters}
        own = torch.stack([squares[name] for name in squares if name in self._split]).sum()
        shared = sum(square for name, square in squares.items() if name not in self._split)

        def clip(of_shards: Tensor) -> None:
            replicas = self.processes.replicas
            norm = (of_shards + shared).sqrt() / replicas
            factor = (MAX_GRADIENT_NORM / (norm + 1e-6)).clamp_max(1.0) / replicas
            for name in self.parameters:
                self._gradient(name).mul_(factor)

        self.processes.after_backward(own, clip)
        self.processes.finish_backward()
        self.finished = True

    def _sum_vectors(self) -> None:
        """The sums of all gradients that are no matrices, in one piece."""
        vectors = [self._gradient(name) for name in self.parameters if name not in self._matrices]
        joined = torch.cat(vectors)
        self.processes.mesh.tokens.sum_in_place(joined)
        for vector, total in zip(vectors, joined.split([len(v) for v in vectors]), strict=True):
            vector.copy_(total)

    def _gradient(self, name: str) -> Float[Tensor, "..."]:
        gradient = self.parameters[name].grad
        assert gradient is not None
        return gradient


def _contiguous(matrix: Float[Tensor, "rows columns"]) -> Tensor:
    """The matrix or its transpose, whichever lies by row: W_enc lies by latent."""
    return matrix if matrix.is_contiguous() else matrix.t()


def _square(gradient: Tensor) -> Tensor:
    return full_precision(gradient).square().sum()
