"""The L0 sweep of a saved SAE from its folder alone: model and text as its metadata names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sae_lens import logger

from jumprelu_plugin.finetune.l0_sweep import SweepPoint, harvest, run_l0_sweep
from jumprelu_plugin.finetune.refit import RefitSettings
from jumprelu_plugin.formats.saved import load_saved
from jumprelu_plugin.models.options import ModelOptions


def sweep_saved(
    folder: str | Path,
    targets: Sequence[float],
    output: str | Path,
    *,
    settings: RefitSettings | None = None,
    options: ModelOptions | None = None,
    sequences: int = 2048,
    held_out: int = 256,
    context_size: int | None = None,
    log: Callable[[str], None] = logger.info,
) -> list[SweepPoint]:
    """Harvest activations of the SAE in `folder`, and `run_l0_sweep` on them.

    Args:
        sequences, held_out: how many sequences to fit on and to evaluate on.

    Raises as `load_saved` and `run_l0_sweep` do.
    """
    settings = settings or RefitSettings()
    saved = load_saved(folder, options, context_size=context_size)
    fit, test = saved.sequences(held_out, train=sequences, seed=settings.seed)
    hook = saved.dictionary.cfg.metadata.hook_name
    special = saved.model.tokenizer.all_special_ids
    return run_l0_sweep(
        folder,
        targets,
        output,
        rows=harvest(saved.model, hook, fit, special_token_ids=special, seed=settings.seed),
        held_out=harvest(saved.model, hook, test, special_token_ids=special),
        settings=settings,
        model=saved.model,
        tokens=test,
        log=log,
    )
