"""A whole dictionary from its shards, and a shard from a whole one.

Checkpoints and results are those of one process: what the shards hold is joined on the first, in
its host's memory, a tensor at a time, and read back one process after the other. So a run that was
started on two processes goes on on four, or on one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam

from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from jumprelu_plugin.training.distributed.processes import ManyProcesses
from jumprelu_plugin.training.distributed.sharded_sae import (
    LATENT_AXIS,
    ShardOfSAE,
    Undrawn,
    plain_name,
)

_WHOLE: dict[str, type[JumpReLUTrainingSAE]] = {
    "jumprelu": JumpReLUTrainingSAE,
    "jumprelu_transcoder": JumpReLUTrainingTranscoder,
    "jumprelu_skip_transcoder": JumpReLUTrainingSkipTranscoder,
}
# What training sets in a config.
_SET_IN_TRAINING = ("normalize_activations", "device", "sae_lens_training_version")


def gather_whole(shard: ShardOfSAE) -> JumpReLUTrainingSAE | None:
    """The dictionary that the shards hold, on the first process's host; None on the others.

    Every process calls it; those of the first replica send.
    """
    whole = _empty_whole(shard) if is_first(shard.processes) else None
    parameters = {} if whole is None else dict(whole.named_parameters())
    for name, part in shard.named_parameters():
        found = gather(part.detach(), _axis(name), shard.processes)
        if found is not None:
            parameters[name].data = found
    tensors = {
        name: gather(value, 0, shard.processes) for name, value in shard.control.tensors().items()
    }
    if whole is not None:
        whole.control.load_state(shard.control.state(), tensors)  # type: ignore[arg-type]
    return whole


def gather_optimizer(shard: ShardOfSAE, optimizer: Any, whole: Any) -> Adam | None:
    """The optimizer of the whole dictionary, with the state of every shard's."""
    gathered: list[dict[str, Tensor | None]] = []
    for name, parameter in shard.named_parameters():
        state = optimizer.state.get(parameter, {})
        gathered.append(
            {
                key: gather(value, _axis(name) if value.ndim else None, shard.processes)
                for key, value in state.items()
            }
        )
    if whole is None:
        return None
    made = Adam(whole.parameters())
    _copy_settings(optimizer, made)
    for parameter, state in zip(whole.parameters(), gathered, strict=True):
        if state:
            made.state[parameter] = state
    return made


def take_part(whole: JumpReLUTrainingSAE, shard: ShardOfSAE) -> None:
    """In place, make a shard hold its part of a whole dictionary, and its training's state."""
    processes = shard.processes
    if whole.standardization is not None:
        shard.standardize(whole.standardization)
    mine = dict(shard.named_parameters())
    for name, parameter in whole.named_parameters():
        mine[name].data = _part(parameter.detach(), name, processes).to(mine[name].device)
    shard.whitening = whole.whitening
    shard.calibrated, shard.has_loaded_weights = whole.calibrated, whole.has_loaded_weights
    tensors = {name: processes.part_of(value) for name, value in whole.control.tensors().items()}
    shard.control.load_state(whole.control.state(), tensors)


def take_optimizer_part(
    whole: JumpReLUTrainingSAE, optimizer: Adam, shard: ShardOfSAE, mine: Any
) -> None:
    """In place, give a shard's optimizer its part of the whole's state."""
    _copy_settings(optimizer, mine)
    own = dict(shard.named_parameters())
    (group,) = mine.param_groups
    for name, parameter in whole.named_parameters():
        device = own[name].device
        # PyTorch's fused kernel counts steps on the device, the others on the host.
        counts_on = device if group.get("fused") or group.get("capturable") else "cpu"
        mine.state[own[name]] = {
            key: _part(value, name, shard.processes).to(device)
            if value.ndim
            else value.to(counts_on)
            for key, value in optimizer.state.get(parameter, {}).items()
        }


def whole_like(shard: ShardOfSAE) -> JumpReLUTrainingSAE:
    """A dictionary of the whole's config on the host; its weights mean nothing yet."""
    cfg = copy.copy(shard.whole_cfg)
    device, cfg.device = cfg.device, "cpu"
    with Undrawn():
        made = _WHOLE[cfg.architecture()](cfg)
    made.cfg.device = device
    return made


def gather(part: Tensor, axis: int | None, processes: ManyProcesses) -> Tensor | None:
    """A tensor of the whole dictionary on the first process's host; None on the others.

    Args:
        axis: of the latents; None: every process holds the same.
    """
    mesh = processes.mesh
    if mesh.replica:
        return None  # it has what the first replica has
    first = is_first(processes)
    if axis is None:
        return part.detach().cpu().clone() if first else None
    sent = part.detach().movedim(axis, 0).contiguous()
    if not first:
        mesh.traffic["send"] += sent.nbytes
        dist.send(sent, group=mesh.latents.handle, group_dst=0)
        return None
    layout = processes.layout
    whole = torch.empty(layout.d_sae, *sent.shape[1:], dtype=sent.dtype)
    layout.place(sent.cpu(), 0, whole)
    received = torch.empty_like(sent)
    for other in range(1, layout.shards):
        dist.recv(received, group=mesh.latents.handle, group_src=other)
        layout.place(received.cpu(), other, whole)
    return whole.movedim(0, axis)


def is_first(processes: ManyProcesses) -> bool:
    """Whether this is the process that saves, and speaks for all."""
    return processes.mesh.replica == 0 and processes.shard == 0


def _empty_whole(shard: ShardOfSAE) -> JumpReLUTrainingSAE:
    whole = whole_like(shard)
    for field in _SET_IN_TRAINING:
        if hasattr(shard.cfg, field):
            setattr(whole.cfg, field, getattr(shard.cfg, field))
    if not shard.parametrized_names():
        whole.store_plainly()
        whole.standardization = shard.standardization
    elif shard.standardization is not None:
        whole.standardize(shard.standardization)
    whole.whitening = shard.whitening
    whole.calibrated, whole.has_loaded_weights = shard.calibrated, shard.has_loaded_weights
    return whole


def _part(value: Tensor, name: str, processes: ManyProcesses) -> Tensor:
    axis = _axis(name)
    if axis is None:
        return value.detach().clone()
    return processes.layout.part(value, processes.shard, axis)


def _axis(name: str) -> int | None:
    """The axis of the latents in a parameter, as `named_parameters` calls it; None: it has none."""
    return LATENT_AXIS.get(plain_name(name))


def _copy_settings(source: Any, target: Any) -> None:
    (given,), (group,) = source.param_groups, target.param_groups
    group.update({name: value for name, value in given.items() if name != "params"})
