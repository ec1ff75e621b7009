"""The training loop of one process that holds a part of every layer's latents.

Every process is given whole batches, trains on its own tokens of each, and stops and saves with the
others. What is saved is the whole transcoder, by the first process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.saes.tensor_files import explained
from jumprelu_plugin.training.distributed.agreed import AgreedBatches
from jumprelu_plugin.training.distributed.gathering import gather
from jumprelu_plugin.training.distributed.launch import Launch
from jumprelu_plugin.transcoders.clt.folder import save_layers
from jumprelu_plugin.transcoders.clt.model import SourceLayer
from jumprelu_plugin.transcoders.clt.saved_training import SavedTraining
from jumprelu_plugin.transcoders.clt.sharded_step import ShardedTrainingStep, latent_axis
from jumprelu_plugin.transcoders.clt.trainer import Trainer


class ShardedTrainer(Trainer):
    """Trains one shard of a cross-layer transcoder.

    Args:
        launch: the processes of the run.
        training_step: of a shard.
        parts: of `Trainer`.
    """

    def __init__(
        self, launch: Launch, training_step: ShardedTrainingStep, *parts: Any, **kept: Any
    ):
        super().__init__(training_step, *parts, **kept)
        self.launch, self.processes = launch, training_step.processes

    @override
    def make_batches(self) -> AgreedBatches:
        batches = AgreedBatches(self.store.get_multi_hook_data_loader())
        batches.launch = self.launch
        return batches

    @override
    def own_tokens(self, rows: Float[Tensor, "batch width"]) -> Float[Tensor, "tokens width"]:
        return self.launch.mesh.tokens_of(rows)

    @override
    def clip_gradients(self) -> None:
        """Nothing: they are clipped where they are summed (`distributed.gradients`)."""

    # ---------------------------------------------------------------- checkpoints and the result

    @override
    def state(self) -> SavedTraining:
        """One process's, on the first; on the others it says nothing of the latents."""
        own = super().state()
        tensors = {name: self._whole(value, name) for name, value in own.tensors.items()}
        names = [name for name, _ in self.model.named_parameters()]
        moments = {
            index: {key: self._whole(value, names[index]) for key, value in of_one.items()}
            for index, of_one in own.optimizer["state"].items()
        }
        optimizer = {**own.optimizer, "state": moments}
        return dataclasses.replace(own, tensors=tensors, optimizer=optimizer)

    def _whole(self, value: Tensor, name: str) -> Tensor | None:
        return gather(value, _axis(name) if value.ndim else None, self.processes)

    @override
    def load(self, checkpoint: str | Path) -> None:
        """As `Trainer.load`, this shard's part; one process after the other reads the whole."""
        for turn in range(self.launch.size):
            mine = turn == self.launch.rank
            self.launch.agree(partial(super().load, checkpoint) if mine else _nothing)

    @override
    def read(self, checkpoint: Path) -> SavedTraining:
        whole = SavedTraining.read(checkpoint, "cpu")
        with explained(checkpoint, "resume from an earlier one, or start anew"):
            return self._part_of(whole)

    def _part_of(self, whole: SavedTraining) -> SavedTraining:
        names = [name for name, _ in self.model.named_parameters()]
        optimizer = dict(whole.optimizer)
        optimizer["state"] = {
            index: {key: self._part(value, names[index]) for key, value in of_one.items()}
            for index, of_one in whole.optimizer["state"].items()
        }
        tensors = {
            name: self._part(value, name).to(self.model.device)
            for name, value in whole.tensors.items()
        }
        return dataclasses.replace(whole, tensors=tensors, optimizer=optimizer)

    def _part(self, value: Tensor, name: str) -> Tensor:
        axis = _axis(name) if value.ndim else None
        if axis is None:
            return value.clone()
        return self.processes.layout.part(value, self.processes.shard, axis)

    def save_clt(self, folder: Path) -> None:
        """Write the whole transcoder, a layer at a time, by the first process.

        Raises:
            ValueError, OSError: as `folder.save_clt`, on every process.
        """
        layers, error = whole_layers(self), None
        if self.launch.rank == 0:
            try:
                save_layers(self.model.cfg, layers, folder)
            except Exception as raised:
                error = raised
        for _ in layers:  # what the first was sent, or is sent still where it failed
            pass

        def say() -> None:
            if error is not None:
                raise error

        self.launch.from_the_first(say)


def whole_layers(trainer: ShardedTrainer) -> Iterator[SourceLayer]:
    """The layers of the whole transcoder, one after the other, on the first process's host.

    Every process goes through all of them; what the others get has no numbers.
    """
    shape, processes = trainer.model.cfg, trainer.processes
    for index, source in enumerate(trainer.model.sources):
        with torch.device("meta"):
            whole = SourceLayer(shape.d_in, shape.d_sae, shape.d_out, shape.later(index))
        for name, parameter in source.named_parameters():
            found = gather(parameter.detach(), latent_axis(name), processes)
            if found is not None:
                setattr(whole, name, torch.nn.Parameter(found, requires_grad=False))
        yield whole


def _nothing() -> None:
    """What a process does while another has its turn."""


def _axis(name: str) -> int | None:
    """The axis of the latents in a tensor of a checkpoint or a parameter; a control's have one."""
    kept_by_control = "." not in name
    return 0 if kept_by_control else latent_axis(name)
