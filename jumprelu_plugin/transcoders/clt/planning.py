"""A cross-layer transcoder's training looked at before it starts: `train-clt --check_only`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.training.distributed.hardware import hardware
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.planning import parameters_before
from jumprelu_plugin.training.distributed.shares import require_positive, shared_pass_findings
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.health.memory import usual_entries
from jumprelu_plugin.transcoders.clt.forecast import clt_step_times, clt_traffic
from jumprelu_plugin.transcoders.clt.many_processes import checked_training
from jumprelu_plugin.transcoders.clt.memory import parameter_count
from jumprelu_plugin.transcoders.clt.run import (
    RECORD_FILENAME,
    config_of,
    schedule_of,
    within_memory,
)
from jumprelu_plugin.transcoders.output_folder import claim_output_folder
from jumprelu_plugin.transcoders.planning import LayerPlan, room_of_each
from jumprelu_plugin.transcoders.settings import CLTSettings, refuse_memory_limit
from jumprelu_plugin.transcoders.sources import model_of, texts_of


def plan_clt(
    output: str | Path,
    settings: CLTSettings,
    *,
    data_parallel_size: int = 1,
    model_parallel_size: int = 1,
    gpu: str | None = None,
    model: Any = None,
    dataset: Any = None,
) -> LayerPlan:
    """What a run would take, without starting it or its processes. Writes nothing.

    Args:
        output, settings, model, dataset: as of `train_clt`.
        data_parallel_size, model_parallel_size: as of `train_sharded_clt`.
        gpu: whose published memory and rates the run is held against (`hardware.HARDWARE`); None:
            this machine's memory, and the rates of its GPU or an H100's.

    Raises:
        ValueError: as `train_clt` and `train_sharded_clt` raise it, or there are no figures of this
            GPU.
    """
    require_device(settings.device)
    published = None if gpu is None else hardware(gpu)
    replicas, shards = data_parallel_size, model_parallel_size
    require_positive(replicas, shards)
    training = checked_training(settings, replicas, shards)
    if replicas * shards > 1:
        refuse_memory_limit(settings)
    claim_output_folder(Path(output), settings, RECORD_FILENAME)
    model = model_of(settings, model)
    cfg = config_of(model, settings)
    LatentLayout(cfg.d_sae, shards)
    texts_of(model, replace(settings, evaluation_sequences=0), dataset)
    planned = settings if published is None else replace(settings, device="cuda")
    _, memory = within_memory(model, cfg, planned, replicas, shards)
    batch = settings.train_batch_size_tokens
    element_size = next(iter(model.parameters())).element_size()
    sent = clt_traffic(
        cfg,
        batch,
        replicas,
        shards,
        controls_l0=training.controls_l0,
        limits_outliers=training.outlier_norm_ratio is not None,
        prompts=settings.store_batch_size_prompts,
        activation_bytes=element_size,
    )
    rates = published or hardware()
    times = clt_step_times(
        cfg,
        batch,
        replicas,
        shards,
        rates,
        entries=usual_entries(batch, cfg.d_sae, training.target_l0),
        sent=sent,
        model_parameters=parameters_before(model, cfg.pairs[-1].hook_out),
        model_in_bfloat16=element_size == 2,
        prompts=settings.store_batch_size_prompts,
    )
    processes = replicas * shards
    log_findings(shared_pass_findings(settings.store_batch_size_prompts, processes))
    numbers = [
        ("steps", f"{schedule_of(settings).steps:,} of {batch:,} tokens"),
        (
            "parameters",
            f"{parameter_count(cfg):,} in {cfg.n_layers} layers of {cfg.d_sae:,} latents",
        ),
    ]
    if processes > 1:
        numbers += [
            (
                "a process has",
                f"{cfg.d_sae // shards:,} latents of each layer and {batch // replicas:,} of "
                f"{batch:,} tokens",
            ),
            ("it hands over", sent.described()),
        ]
    numbers.append(("bound by", times.described(rates)))
    room, place = room_of_each(settings.device, processes, published)
    return LayerPlan(processes, memory, room, place, tuple(numbers))
