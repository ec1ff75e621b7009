"""What a step of a cross-layer transcoder's training exchanges and takes, from its sizes alone.

docs/guides/many-gpus.md has the same sums of bytes, which tests count. The times are arithmetic at
published rates, as for an SAE (`training.distributed.forecast`).
"""

from __future__ import annotations

from jumprelu_plugin.training.distributed.division import handed_over, share_of_pass
from jumprelu_plugin.training.distributed.forecast import (
    DECODER_PASSES,
    FLOAT32,
    INT64,
    PASSES,
    StepTimes,
    Traffic,
    exchange_seconds,
)
from jumprelu_plugin.training.distributed.hardware import Hardware
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.memory import decoder_count, parameter_count


def clt_traffic(
    cfg: CLTConfig,
    batch: int,
    replicas: int,
    shards: int,
    *,
    controls_l0: bool = True,
    limits_outliers: bool = False,
    prompts: int | None = None,
    activation_bytes: int = FLOAT32,
) -> Traffic:
    """Bytes that each process hands over in a step; a group of one exchanges nothing.

    Args:
        cfg: of the whole transcoder.
        batch: tokens in a step of all processes.
        controls_l0, limits_outliers: what the training does.
        prompts: sequences of a pass of the model; None: as many as divide evenly.
        activation_bytes: of a number that is harvested.
    """
    processes = replicas * shards
    tokens, held, layers = batch // replicas, cfg.d_sae // shards, cfg.n_layers
    row = column = every = harvest = 0
    if shards > 1:
        # ŷ of all layers; their penalties, and whether a bias or a threshold is finite.
        row = FLOAT32 * (tokens * layers * cfg.d_out + layers + 1)
    if replicas > 1:
        # Gradients; how often each latent is active; errors; norms of each output's tokens.
        column = FLOAT32 * (parameter_count(cfg, shards) + layers * held + layers)
        column += FLOAT32 * tokens * layers * limits_outliers
    if processes > 1:
        # Two slopes and a sum of gradients for each λ, the gradient's norm; two counts a layer.
        every = FLOAT32 * (3 * layers * controls_l0 + 1) + 2 * INT64 * layers
        width = layers * (cfg.d_in + cfg.d_out)
        harvest = handed_over(batch, prompts or processes, processes, width, activation_bytes)
    return Traffic(row, column, every, harvest)


def clt_step_times(
    cfg: CLTConfig,
    batch: int,
    replicas: int,
    shards: int,
    gpu: Hardware,
    *,
    entries: float,
    sent: Traffic,
    model_parameters: float = 0.0,
    model_in_bfloat16: bool = True,
    prompts: int | None = None,
) -> StepTimes:
    """The times of a screened step on a mesh of one kind of GPU.

    Args:
        entries: pairs a token in each layer's window or above it, over all its latents. A third of
            them are active.
        sent: in the step.
        model_parameters: through which a token of the language model goes.
        prompts: as of `clt_traffic`.
    """
    processes = replicas * shards
    tokens, held = batch / replicas, cfg.d_sae / shards
    product = 2 * tokens * cfg.n_layers * cfg.d_in * held / gpu.bfloat16
    rate = gpu.bfloat16 if model_in_bfloat16 else gpu.float32
    prompts = prompts or processes
    run = batch * share_of_pass(prompts, processes) / prompts
    model = 2 * model_parameters * run / rate
    decoders = decoder_count(cfg)
    # Rows of the encoder for the exact value and the gradient; of each decoder, for the pairs that
    # are active, for the output, its gradient and the decoder's gradient.
    rows = cfg.n_layers * 2 * cfg.d_in + decoders * cfg.d_out
    pairs = FLOAT32 * tokens * entries / shards * rows
    passes = FLOAT32 * PASSES * parameter_count(cfg, shards)
    passes += FLOAT32 * DECODER_PASSES * decoders * held * cfg.d_out
    return StepTimes(
        compute=product + model,
        memory=(pairs + passes) / gpu.memory_bandwidth,
        exchange=exchange_seconds(sent, replicas, shards, gpu),
    )
