"""The bytes that the processes of a cross-layer transcoder's training exchange in a step.

docs/guides/many-gpus.md has the same sums, which tests count.
"""

from __future__ import annotations

from jumprelu_plugin.training.distributed.forecast import FLOAT32, Traffic
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.memory import parameter_count


def clt_traffic(
    cfg: CLTConfig,
    batch: int,
    replicas: int,
    shards: int,
    *,
    controls_l0: bool = True,
    limits_outliers: bool = False,
) -> Traffic:
    """Bytes that each process hands over in a step; a group of one exchanges nothing.

    Args:
        cfg: of the whole transcoder.
        batch: tokens in a step of all processes.
        controls_l0, limits_outliers: what the training does.
    """
    tokens, held, layers = batch // replicas, cfg.d_sae // shards, cfg.n_layers
    row = column = every = harvest = 0
    if shards > 1:
        # ŷ of all layers; their penalties, and whether a bias or a threshold is finite.
        row = FLOAT32 * (tokens * layers * cfg.d_out + layers + 1)
    if replicas > 1:
        # Gradients; how often each latent is active; errors; norms of each output's tokens.
        column = FLOAT32 * (parameter_count(cfg, shards) + layers * held + layers)
        column += FLOAT32 * tokens * layers * limits_outliers
    if replicas * shards > 1:
        # Two slopes and a sum of gradients for each λ, the gradient's norm; counts in float64.
        every = FLOAT32 * (3 * layers * controls_l0 + 1) + 8 * layers
        harvest = FLOAT32 * batch * layers * (cfg.d_in + cfg.d_out) // (replicas * shards)
    return Traffic(row, column, every, harvest)
