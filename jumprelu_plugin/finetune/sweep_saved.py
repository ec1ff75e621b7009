"""The L0 sweep of a saved SAE, with the model and the text that its metadata names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens import logger

from jumprelu_plugin.finetune.activations import harvest_activations
from jumprelu_plugin.finetune.l0_sweep import SweepPoint, require_empty_folder, run_l0_sweep
from jumprelu_plugin.finetune.pretrained import read_pretrained
from jumprelu_plugin.finetune.refit import RefitSettings, require_positive_targets
from jumprelu_plugin.formats.saved import load_saved
from jumprelu_plugin.models.hooks import sae_sites
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.models.trained_on import excluded_tokens, sae_heads, trained_positions


def run_saved_l0_sweep(
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
    """Harvest activations for the SAE in `folder`, and call `run_l0_sweep` with them.

    Args:
        folder: the SAE's folder.
        targets: the L0s.
        output: a new or empty folder.
        settings: settings of each training; its device is the options'.
        options: the model and the text; by default those of the SAE's metadata.
        sequences, held_out: the numbers of sequences to fit on and to evaluate on.
        context_size: tokens in a sequence; by default that of the SAE's metadata.
        log: called with one line before each point.

    Raises:
        ValueError, OSError, FileNotFoundError: as `load_saved` and `run_l0_sweep`.
    """
    options = options or ModelOptions()
    # Before the model is loaded and run on the text.
    require_positive_targets(targets)
    require_empty_folder(output)
    read_pretrained(folder, hook_name=options.hook_name, model_name=options.model_name)
    settings = replace(settings or RefitSettings(), device=options.device)
    saved = load_saved(folder, options, context_size=context_size)
    fit, test = saved.sequences(held_out, train=sequences, seed=settings.seed)
    read: dict[str, Any] = {
        "special_token_ids": {
            *saved.model.tokenizer.all_special_ids,
            *excluded_tokens(saved.dictionary),
        },
        "positions": trained_positions(saved.dictionary),
        "head": sae_heads(saved.dictionary)[0],
    }
    hook, _ = sae_sites(saved.dictionary)
    return run_l0_sweep(
        folder,
        targets,
        output,
        activations=harvest_activations(saved.model, hook, fit, seed=settings.seed, **read),
        held_out=harvest_activations(saved.model, hook, test, **read),
        hook_name=hook,
        model_name=saved.dictionary.cfg.metadata.model_name or saved.choice.model_name,
        settings=settings,
        model=saved.model,
        tokens=test,
        log=log,
    )
