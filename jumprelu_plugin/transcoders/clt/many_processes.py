"""`jumprelu train-clt` on the processes that torchrun started: latents sharded, batches split.

    torchrun --nproc-per-node N -m jumprelu_plugin train-clt … --model_parallel_size N

Each process holds its share of every layer's latents: it encodes them from that layer's input and
decodes them to all later outputs. The output folder, its checkpoints and the settings are those of
one process: a run that was started on two goes on on four, or on one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.training.checkpoints import explained_at_the_end, refuse_negative_minutes
from jumprelu_plugin.training.distributed.agreed import CheckpointsByTheFirst
from jumprelu_plugin.training.distributed.harvest import SharedHarvest
from jumprelu_plugin.training.distributed.launch import Launch, joined, without_sigterm
from jumprelu_plugin.training.distributed.layout import LatentLayout
from jumprelu_plugin.training.distributed.runner import digest_of_text
from jumprelu_plugin.training.distributed.shares import require_even_batch, shared_pass_findings
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.health.memory import size
from jumprelu_plugin.training.health.schedule import density_findings
from jumprelu_plugin.transcoders.clt.config import CLTConfig, CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.forecast import clt_traffic
from jumprelu_plugin.transcoders.clt.run import (
    RECORD_FILENAME,
    config_of,
    evaluated,
    fitting_config,
    schedule_of,
    store_of,
    training_config,
    within_memory,
    write_record,
)
from jumprelu_plugin.transcoders.clt.sharded_step import ShardedTrainingStep, shard_of_clt
from jumprelu_plugin.transcoders.clt.sharded_trainer import ShardedTrainer
from jumprelu_plugin.transcoders.memory import MemoryEstimate
from jumprelu_plugin.transcoders.output_folder import (
    METRICS_FILENAME,
    checkpoints_of,
    claim_output_folder,
    finish_output_folder,
    held_by_the_first,
    start_output_folder,
)
from jumprelu_plugin.transcoders.settings import CLTSettings, refuse_memory_limit
from jumprelu_plugin.transcoders.sources import model_of, texts_of


def train_sharded_clt(
    output: str | Path,
    settings: CLTSettings,
    *,
    data_parallel_size: int = 1,
    model_parallel_size: int = 1,
    model: Any = None,
    dataset: Any = None,
    log: Callable[[Any], None] = print,
) -> Path:
    """Train the transcoder on all processes that torchrun started; see `train_clt`.

    Every process calls it with the same arguments.

    Args:
        data_parallel_size: over how many replicas each batch is split.
        model_parallel_size: over how many processes the latents of each are sharded. The product is
            the number of processes.

    Raises:
        ValueError, OSError: on the first process, as `train_clt` raises them; the sizes do not
            multiply to the number of processes or do not divide d_sae and the batch, `memory_gb` is
            set, or the processes have different settings or texts. SystemExit on the others.
        sae_lens.training._interruption.InterruptedException: Ctrl-C or SIGTERM stopped the run; a
            checkpoint is saved.
    """
    sizes = data_parallel_size, model_parallel_size
    started = joined(*sizes, settings.device, "the same command", "train-clt")
    output = Path(output)
    with started as launch, without_sigterm(), held_by_the_first(launch, output):
        _train(launch, output, settings, model, dataset, log)
    return output


def _train(
    launch: Launch,
    output: Path,
    settings: CLTSettings,
    model: Any,
    dataset: Any,
    log: Callable[[Any], None],
) -> None:
    replicas, shards = launch.mesh.data_parallel_size, launch.mesh.model_parallel_size
    command = [replicas, shards, asdict(settings)]
    launch.agree_on("command", json.dumps(command, sort_keys=True))
    training = launch.agree(lambda: _checked(settings, replicas, shards))
    checkpoint = launch.from_the_first(
        lambda: claim_output_folder(output, settings, RECORD_FILENAME)
    )
    here = replace(settings, device=launch.own(settings.device))
    model = launch.agree(lambda: model_of(here, model))
    cfg = launch.agree(lambda: config_of(model, here))
    launch.agree(lambda: LatentLayout(cfg.d_sae, shards))
    if launch.rank == 0:
        log_findings(density_findings(training, training.resolve(cfg.d_sae)))
        log_findings(shared_pass_findings(settings.store_batch_size_prompts, launch.size))
    chunk, estimate = launch.agree(lambda: within_memory(model, cfg, here, replicas, shards))
    dataset, held_out = launch.agree(lambda: texts_of(model, here, dataset))
    launch.agree_on("text", digest_of_text(dataset))
    log(_forecast(launch, model, cfg, training, settings, estimate))
    torch.manual_seed(settings.seed)
    training_step = launch.agree(lambda: _step(launch, cfg, training, here.device))
    store = launch.agree(lambda: store_of(model, cfg, here, chunk, dataset))
    SharedHarvest(launch).share(store)
    first = launch.rank == 0
    trainer = ShardedTrainer(
        launch,
        training_step,
        schedule_of(settings),
        store,
        checkpoints=checkpoints_of(output, settings, partial(CheckpointsByTheFirst, launch)),
        metrics_path=output / METRICS_FILENAME if first else None,
    )
    launch.from_the_first(lambda: start_output_folder(output, settings))
    if checkpoint is not None:
        trainer.load(checkpoint)
    trainer.fit()
    trainer.fold_scales()
    with explained_at_the_end(output, trainer.checkpoints.last, "the same command"):
        trainer.save_clt(output)
    dead = training_step.dead_share()

    def finish() -> None:
        # One GPU may not have the room for what several hold.
        found = evaluated(model, output, held_out, here.device if shards == 1 else "cpu")
        if found is not None:
            log(found.table())
        write_record(output, settings, trainer, dead, estimate, found, model)
        finish_output_folder(output)

    launch.from_the_first(finish)


def _checked(settings: CLTSettings, replicas: int, shards: int) -> CLTTrainingConfig:
    require_device(settings.device)
    refuse_memory_limit(settings)
    return checked_training(settings, replicas, shards)


def checked_training(settings: CLTSettings, replicas: int, shards: int) -> CLTTrainingConfig:
    """How it is trained; what can be refused without the model is.

    Raises:
        ValueError: a setting that cannot be, or sizes that do not divide the batch or d_sae.
    """
    training = fitting_config(training_config(settings), settings)
    refuse_negative_minutes(settings.checkpoint_every_n_minutes)
    schedule_of(settings)
    require_even_batch(settings, replicas)
    if settings.d_sae is not None:
        LatentLayout(settings.d_sae, shards)
    return training


def _step(
    launch: Launch, cfg: CLTConfig, training: CLTTrainingConfig, device: str
) -> ShardedTrainingStep:
    shard, processes = shard_of_clt(cfg, launch.mesh)
    return ShardedTrainingStep(shard.to(device), training, processes)


def _forecast(
    launch: Launch,
    model: Any,
    cfg: CLTConfig,
    training: CLTTrainingConfig,
    settings: CLTSettings,
    estimate: MemoryEstimate,
) -> str:
    mesh = launch.mesh
    sent = clt_traffic(
        cfg,
        settings.train_batch_size_tokens,
        mesh.data_parallel_size,
        mesh.model_parallel_size,
        controls_l0=training.controls_l0,
        limits_outliers=training.outlier_norm_ratio is not None,
        prompts=settings.store_batch_size_prompts,
        activation_bytes=next(iter(model.parameters())).element_size(),
    )
    return (
        f"memory of each of {launch.size} processes: {estimate}, beside Python and PyTorch; "
        f"each hands over {size(sent.total)} a step"
    )
