"""`jumprelu train-transcoders` on the processes that torchrun started, which share the layers.

    torchrun --nproc-per-node N -m jumprelu_plugin train-transcoders …

The output folder, its checkpoints and the settings are those of one process: a run that was started
on two goes on on four, or on one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.records import UNFINISHED, whole_files
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.checkpoints import refuse_negative_minutes
from jumprelu_plugin.training.distributed.launch import Launch, joined, without_sigterm
from jumprelu_plugin.training.distributed.runner import digest_of_text
from jumprelu_plugin.training.distributed.shares import shared_pass_findings
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.runner import quiet
from jumprelu_plugin.transcoders.output_folder import (
    METRICS_FILENAME,
    checkpoints_of,
    claim_output_folder,
    finish_output_folder,
    held_by_the_first,
    start_output_folder,
)
from jumprelu_plugin.transcoders.per_layer.dealing import DealtCheckpoints, DealtRunner, dealt
from jumprelu_plugin.transcoders.per_layer.run import (
    RECORD_FILENAME,
    config_of,
    evaluated,
    layers_of,
    pairs_of,
    runner_config,
    within_memory,
    write_record,
)
from jumprelu_plugin.transcoders.settings import (
    TranscoderSettings,
    refuse_impossible,
    refuse_memory_limit,
)
from jumprelu_plugin.transcoders.sources import model_of, texts_of


def train_dealt_transcoders(
    output: str | Path,
    settings: TranscoderSettings,
    *,
    model: Any = None,
    dataset: Any = None,
    log: Callable[[Any], None] = print,
) -> Path:
    """Train the transcoders on all processes that torchrun started; see `train_transcoders`.

    Every process calls it with the same arguments, and sees the same file system.

    Raises:
        ValueError, OSError: on the first process, as `train_transcoders` raises them; there are
            more processes than layers, `memory_gb` is set, or the processes have different settings
            or texts. SystemExit on the others.
        sae_lens.training._interruption.InterruptedException: Ctrl-C or SIGTERM stopped the run; a
            checkpoint is saved.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    started = joined(1, size, settings.device, "the same command")
    output = Path(output)
    with started as launch, without_sigterm(), held_by_the_first(launch, output):
        _train(launch, output, settings, model, dataset, log)
    return output


def _train(
    launch: Launch,
    output: Path,
    settings: TranscoderSettings,
    model: Any,
    dataset: Any,
    log: Callable[[Any], None],
) -> None:
    launch.agree_on("command", json.dumps(asdict(settings), sort_keys=True))
    launch.agree(lambda: _refuse(settings))
    checkpoint = launch.from_the_first(
        lambda: claim_output_folder(output, settings, RECORD_FILENAME)
    )
    here = replace(settings, device=launch.own(settings.device))
    model = launch.agree(lambda: model_of(here, model))
    pairs = launch.agree(lambda: pairs_of(model, here))
    mine = launch.agree(lambda: dealt(list(pairs), launch.rank, launch.size))
    widths = launch.agree(lambda: pair_widths(model, pairs.values()))
    configs = launch.agree(lambda: {n: config_of(p, widths, here) for n, p in pairs.items()})
    hooks = pair_widths(model, [pairs[name] for name in mine])
    here, estimate = within_memory(model, {name: configs[name] for name in mine}, hooks, here)
    if launch.rank == 0:
        log_findings(shared_pass_findings(settings.store_batch_size_prompts, launch.size))
    log(f"memory of each of {launch.size} processes: {estimate}, beside Python and PyTorch")
    dataset, held_out = launch.agree(lambda: texts_of(model, here, dataset))
    launch.agree_on("text", digest_of_text(dataset))
    checkpoints = checkpoints_of(output, settings, partial(DealtCheckpoints, launch))
    cfg = launch.agree(lambda: runner_config(configs, pairs, here, output, checkpoint))
    with quiet():
        runner = launch.agree(
            lambda: DealtRunner(
                launch,
                cfg,
                pairs,
                override_dataset=dataset,
                override_model=model,
                metrics_path=output / METRICS_FILENAME,
                checkpoints=checkpoints,
            )
        )
    launch.from_the_first(lambda: start_output_folder(output, settings))
    first = launch.rank == 0
    with whole_files(output) if first else nullcontext(output / UNFINISHED) as unfinished:
        launch.wait()  # for the first to have made it
        part = unfinished / f"process_{launch.rank}"
        runner.cfg.output_path = str(part)
        trained = runner.run()
        parts = launch.all_objects(part)
        if first:
            _join(parts, unfinished)
    found = launch.all_objects(layers_of(pairs, trained))
    layers = {layer["folder"]: layer for part_of_all in found for layer in part_of_all}

    def finish() -> None:
        evaluation = evaluated(model, output, pairs, held_out, here)
        if evaluation is not None:
            log(evaluation.table())
        in_order = [layers[name] for name in pairs]
        write_record(output, settings, in_order, estimate, evaluation, model)
        finish_output_folder(output)

    launch.from_the_first(finish)


def _refuse(settings: TranscoderSettings) -> None:
    require_device(settings.device)
    refuse_impossible(settings)
    refuse_negative_minutes(settings.checkpoint_every_n_minutes)
    refuse_memory_limit(settings)


def _join(parts: list[Path], into: Path) -> None:
    """Move what the processes wrote into one folder."""
    for part in parts:
        (part / RUNNER_CFG_FILENAME).unlink()
        for path in sorted(part.iterdir()):
            path.replace(into / path.name)
        shutil.rmtree(part)
