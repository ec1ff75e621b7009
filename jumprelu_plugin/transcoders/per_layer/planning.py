"""Transcoders of several layers looked at before they are trained: `--check_only`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.checkpoints import refuse_negative_minutes
from jumprelu_plugin.training.distributed.division import handed_over
from jumprelu_plugin.training.distributed.hardware import hardware
from jumprelu_plugin.training.distributed.shares import shared_pass_findings
from jumprelu_plugin.training.health.findings import log_findings
from jumprelu_plugin.training.health.memory import size
from jumprelu_plugin.training.health.schedule import steps_taken
from jumprelu_plugin.transcoders.memory import transcoder_parameters
from jumprelu_plugin.transcoders.output_folder import claim_output_folder
from jumprelu_plugin.transcoders.per_layer.dealing import dealt
from jumprelu_plugin.transcoders.per_layer.run import (
    RECORD_FILENAME,
    config_of,
    pairs_of,
    runner_config,
    within_memory,
)
from jumprelu_plugin.transcoders.planning import LayerPlan, room_of_each
from jumprelu_plugin.transcoders.settings import (
    TranscoderSettings,
    refuse_impossible,
    refuse_memory_limit,
)
from jumprelu_plugin.transcoders.sources import model_of, texts_of


def plan_transcoders(
    output: str | Path,
    settings: TranscoderSettings,
    *,
    processes: int = 1,
    gpu: str | None = None,
    model: Any = None,
    dataset: Any = None,
) -> LayerPlan:
    """What a run would take, without starting it or its processes. Writes nothing.

    Args:
        output, settings, model, dataset: as of `train_transcoders`.
        processes: that torchrun would start. The plan is of the first, which has the most layers.
        gpu: whose published memory the run is held against (`hardware.HARDWARE`); None: this
            machine's.

    Raises:
        ValueError: as `train_transcoders` and `train_dealt_transcoders` raise it, or there are no
            figures of this GPU.
    """
    require_device(settings.device)
    published = None if gpu is None else hardware(gpu)
    refuse_impossible(settings)
    if processes < 1:
        raise ValueError(f"processes is {processes}; give at least 1")
    if processes > 1:
        refuse_memory_limit(settings)
    refuse_negative_minutes(settings.checkpoint_every_n_minutes)
    output = Path(output)
    claim_output_folder(output, settings, RECORD_FILENAME)
    model = model_of(settings, model)
    pairs = pairs_of(model, settings)
    widths = pair_widths(model, pairs.values())
    # The first process has the most layers, and the last the fewest.
    most, fewest = (dealt(list(pairs), rank, processes) for rank in (0, processes - 1))

    def widths_of(names: list[str]) -> dict[str, int]:
        return {hook: widths[hook] for name in names for hook in vars(pairs[name]).values()}

    configs = {name: config_of(pair, widths, settings) for name, pair in pairs.items()}
    texts_of(model, replace(settings, evaluation_sequences=0), dataset)
    largest = {name: configs[name] for name in most}
    now, memory = within_memory(model, largest, widths_of(most), settings)
    run = runner_config(configs, pairs, now, output, None)
    batch = run.train_batch_size_tokens
    numbers = [
        ("steps", f"{steps_taken(run):,} of {batch:,} tokens"),
        (
            "parameters",
            f"{sum(map(transcoder_parameters, configs.values())):,} in {len(configs)} transcoders",
        ),
        ("learning rate", f"{run.lr:g}"),
    ]
    log_findings(shared_pass_findings(settings.store_batch_size_prompts, processes))
    if processes > 1:
        sent = handed_over(
            batch,
            settings.store_batch_size_prompts,
            processes,
            sum(widths.values()) - sum(widths_of(fewest).values()),
            next(iter(model.parameters())).element_size(),
        )
        numbers += [
            ("a process has", f"{len(most)} of {len(configs)} layers at most"),
            ("it hands over", f"activations, {size(sent)} a step at most"),
        ]
    room, place = room_of_each(settings.device, processes, published)
    return LayerPlan(processes, memory, room, place, tuple(numbers))
