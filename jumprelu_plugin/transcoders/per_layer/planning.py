"""Transcoders of several layers looked at before they are trained: `--check_only`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.checkpoints import refuse_negative_minutes
from jumprelu_plugin.transcoders.memory import transcoder_parameters
from jumprelu_plugin.transcoders.output_folder import claim_output_folder
from jumprelu_plugin.transcoders.per_layer.run import (
    RECORD_FILENAME,
    config_of,
    pairs_of,
    runner_config,
    within_memory,
)
from jumprelu_plugin.transcoders.planning import LayerPlan, room_of_each
from jumprelu_plugin.transcoders.settings import TranscoderSettings, refuse_impossible
from jumprelu_plugin.transcoders.sources import model_of, texts_of


def plan_transcoders(
    output: str | Path, settings: TranscoderSettings, *, model: Any = None, dataset: Any = None
) -> LayerPlan:
    """What a run in one process would take, without starting it. Writes nothing.

    Args:
        output, settings, model, dataset: as of `train_transcoders`.

    Raises:
        ValueError: as `train_transcoders` raises it.
    """
    require_device(settings.device)
    refuse_impossible(settings)
    refuse_negative_minutes(settings.checkpoint_every_n_minutes)
    output = Path(output)
    claim_output_folder(output, settings, RECORD_FILENAME)
    model = model_of(settings, model)
    pairs = pairs_of(model, settings)
    widths = pair_widths(model, pairs.values())
    configs = {name: config_of(pair, widths, settings) for name, pair in pairs.items()}
    texts_of(model, replace(settings, evaluation_sequences=0), dataset)
    now, memory = within_memory(model, configs, widths, settings)
    run = runner_config(configs, pairs, now, output, output, None)
    batch = run.train_batch_size_tokens
    numbers = (
        ("steps", f"{run.training_tokens // batch:,} of {batch:,} tokens"),
        (
            "parameters",
            f"{sum(map(transcoder_parameters, configs.values())):,} in {len(configs)} transcoders",
        ),
        ("learning rate", f"{run.lr:g}"),
    )
    room, place = room_of_each(settings.device, 1, None)
    return LayerPlan(1, memory, room, place, numbers)
