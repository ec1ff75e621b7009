"""The step of one process that holds a part of every layer's latents.

It is the step of one process, with its own latents in place of all of them and its own tokens in
place of the batch. `step.processes` has the sums that it takes; here are the weights it starts
from, and the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.training.distributed.gradients import BACKWARD_ORDER, Gradients
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.mesh import Mesh
from jumprelu_plugin.training.distributed.processes import ManyProcesses
from jumprelu_plugin.training.distributed.sharded_sae import LATENT_AXIS, OwnRows
from jumprelu_plugin.transcoders.clt.config import CLTConfig, CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep, StepOutput


class ShardedTrainingStep(CLTTrainingStep):
    """The step of one shard of a cross-layer transcoder.

    Args:
        model: as `shard_of_clt` makes it.
        processes: that hold the shards and split the batch.

    Raises:
        ValueError: the target L0 is above the number of latents.
    """

    processes: ManyProcesses

    def __init__(
        self, model: CrossLayerTranscoder, cfg: CLTTrainingConfig, processes: ManyProcesses
    ):
        super().__init__(model, cfg, processes)
        parameters = dict(model.named_parameters())
        # A backward pass goes down through the layers, whatever the kernels of their steps.
        layers = reversed(range(model.cfg.n_layers))
        places = (f"sources.{layer}.{kind}" for layer in layers for kind in BACKWARD_ORDER)
        matrices = [name for name in places if name in parameters]
        split = frozenset(name for name in parameters if latent_axis(name) is not None)
        self.gradients = Gradients(parameters, matrices, split, frozenset(), processes)
        self.gradients.listen()

    @override
    def loss(
        self,
        inputs: Sequence[Float[Tensor, "tokens d_in"]],
        targets: Sequence[Float[Tensor, "tokens d_out"]],
    ) -> StepOutput:
        self.gradients.begin()
        return super().loss(inputs, targets)

    @override
    def _require_finite(
        self, loss: Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> None:
        # Every process must see what one of them sees, or the others would wait for it.
        vectors = sum(
            s.b_enc.detach().sum() + s.threshold.detach().sum() for s in self.model.sources
        )
        of_all = self.processes.mesh.latents.sum_in_place(torch.zeros_like(loss) * vectors)
        super()._require_finite(loss + of_all, inputs, targets)

    @override
    def _before_update(self) -> None:
        if not self.gradients.finished:
            raise RuntimeError("a parameter of this shard had no gradient: the step is not whole")
        super()._before_update()


def shard_of_clt(cfg: CLTConfig, mesh: Mesh) -> tuple[CrossLayerTranscoder, ManyProcesses]:
    """This process's latents of every layer, with the weights that one process gives them.

    Args:
        cfg: of the whole transcoder.

    Raises:
        ValueError: the latents cannot be dealt evenly.
    """
    processes = ManyProcesses(LatentLayout(cfg.d_sae, mesh.model_parallel_size), mesh)
    with OwnRows(processes.layout, processes.shard):
        return CrossLayerTranscoder(cfg, held=processes.layout.held), processes


def latent_axis(name: str) -> int | None:
    """The axis of the latents in a parameter; None: every process has all of it."""
    return LATENT_AXIS.get(name.rsplit(".", 1)[-1])
