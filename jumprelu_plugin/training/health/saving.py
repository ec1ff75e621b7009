"""What the first of several processes takes on its host while it saves the whole dictionary."""

from __future__ import annotations

from typing import Any

import torch

from jumprelu_plugin.training.distributed.division import Division, dictionary_parameters
from jumprelu_plugin.training.health.machine import available, taken
from jumprelu_plugin.training.health.memory import (
    MemoryForecast,
    harvest_bytes,
    parameter_bytes,
)

HOST = torch.device("cpu")
# Numbers of a checkpoint for one of the dictionary: weights, and Adam's two moments.
CHECKPOINT = 3
# The result is written from a copy of the weights, in the scale of the activations.
RESULT = 2


def saving_forecast(
    cfg: Any, sae: Any, model: Any, *, width: int, division: Division, saves_buffer: bool
) -> MemoryForecast | None:
    """Memory of the first process's host while it saves; None where there is one process alone.

    Every checkpoint holds the weights and both moments of the whole, the result the weights. A run
    with a `checkpoint_path` saves when it is stopped, if not before.

    Args:
        cfg: SAELens' runner config.
        sae: one shard, as a dictionary of its own.
        width: of the rows in the mixing buffer.
        saves_buffer: whether a checkpoint holds it.
    """
    if division.processes == 1:
        return None
    number = next(iter(sae.parameters())).element_size()
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae * division.shards
    d_out = getattr(sae.cfg, "width_out", d_in)
    skips = "skip" in sae.cfg.architecture()
    whole = number * dictionary_parameters(d_in, d_out, d_sae, skips=skips)
    buffer, _, _ = harvest_bytes(cfg, model, width, division, HOST)
    joined = RESULT * whole
    if cfg.checkpoint_path is not None:
        # Files are written from a copy: the encoder's, which lies by latent and is saved by input,
        # and later the mixing buffer's.
        copied = max(number * d_in * d_sae, buffer if saves_buffer else 0)
        joined = max(joined, CHECKPOINT * whole + copied)
    own = torch.device(cfg.device).type == HOST.type
    return MemoryForecast(
        device=str(HOST),
        there=taken(HOST),
        optimizer=2 * parameter_bytes(sae) if own else 0,  # between steps there are no gradients
        buffer=buffer,
        moment="joining",
        working=joined,
        available=available(HOST),
    )
