"""L0 sweep: refits a trained SAE to several L0s, and evaluates and saves each result.

Each point of the sweep is a stock SAELens folder of the same dictionary with other thresholds and,
optionally, a decoder or all parameters trained further. Its L0 and error are measured on tokens
that it was not fitted on, and written as a line of JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from sae_lens import logger
from torch import Tensor

from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.evaluation.metrics import Metrics
from jumprelu_plugin.finetune.activations import evaluate_on_activations
from jumprelu_plugin.finetune.pretrained import read_pretrained
from jumprelu_plugin.finetune.refit import RefitSettings, refit_to_each, shift_thresholds
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.saelens import load_inference_sae
from jumprelu_plugin.records import append_jsonl, provenance, whole_folder
from jumprelu_plugin.saes.parameters import Parameters

RECORD_FILENAME = "l0_sweep.jsonl"
# The largest relative error of the L0 on held-out tokens without a warning.
L0_TOLERANCE = 0.03


@dataclass(frozen=True)
class SweepPoint:
    """The dictionary at one target L0, measured on held-out tokens.

    Attributes:
        folder: its folder, relative to the sweep's.
        target_l0: the L0 it was refitted to.
        l0, fvu, dead_share, share_above_10_percent: as `evaluation.metrics.Metrics` defines them.
        shifted_fvu: the FVU of the original dictionary with all thresholds shifted to this L0.
        delta_loss: delta LM loss in nats; None if no model was given.
    """

    folder: str
    target_l0: float
    l0: float
    fvu: float
    shifted_fvu: float
    dead_share: float
    share_above_10_percent: float
    delta_loss: float | None

    @property
    def relative_error(self) -> float:
        """The relative error of the L0."""
        return abs(self.l0 / self.target_l0 - 1)


def run_l0_sweep(
    source: str | Path,
    targets: Sequence[float],
    output: str | Path,
    *,
    activations: Float[Tensor, "tokens d_in"],
    held_out: Float[Tensor, "tokens d_in"],
    settings: RefitSettings | None = None,
    model: Any = None,
    tokens: Int[Tensor, "sequences positions"] | None = None,
    hook_name: str | None = None,
    model_name: str | None = None,
    log: Callable[[str], None] = logger.info,
) -> list[SweepPoint]:
    """Refit the SAE in `source` to every L0 of `targets`; return the points by ascending L0.

    Each point is written as soon as it is finished: a folder `output/l0_10` and so on, and a line
    of `output/l0_sweep.jsonl`. Warnings name points whose L0 is more than 3 % off, and points that
    have more latents than the one before and no lower error.

    Args:
        source: a folder or file that `read_pretrained` takes.
        targets: the L0s.
        output: a new or empty folder.
        activations: raw activations of the SAE's hook to fit on, in random order
            (`harvest_activations`).
        held_out: raw activations to evaluate on.
        settings: settings of each training.
        model, tokens: if both are given, the delta LM loss is measured on these tokens.
        hook_name, model_name: override the names in the source's files, or replace missing ones.
        log: called with one line before each point.

    Raises:
        ValueError: `output` is not empty, the activations have another width than the dictionary,
            or no thresholds reach a target.
        FileNotFoundError: `source` does not exist.
    """
    settings, output = settings or RefitSettings(), Path(output)
    require_empty_folder(output)
    dictionary = read_pretrained(source, hook_name=hook_name, model_name=model_name)
    for name, given in (("activations", activations), ("held_out", held_out)):
        _check_activations(name, given, dictionary.parameters.d_in)
    points: list[SweepPoint] = []
    for target, parameters in refit_to_each(
        dictionary.parameters, targets, activations, settings, lambda l0: log(f"L0 {l0:g} …")
    ):
        folder = output / f"l0_{target:g}"
        fitted = _as_sae(dictionary, parameters)
        _describe(fitted, target, evaluate_on_activations(fitted, activations), source)
        with whole_folder(folder) as unfinished:
            fitted.save_model(unfinished)
        # Evaluates the saved files, loaded by stock SAELens.
        sae = load_inference_sae(folder)
        metrics = evaluate_on_activations(sae, held_out)
        shifted = _as_sae(dictionary, shift_thresholds(dictionary.parameters, target, activations))
        delta_loss = None
        if model is not None and tokens is not None:
            delta_loss = evaluate(model, sae, tokens).delta_loss
        point = SweepPoint(
            folder=folder.name,
            target_l0=target,
            l0=metrics.l0,
            fvu=metrics.fvu,
            shifted_fvu=evaluate_on_activations(shifted, held_out).fvu,
            dead_share=metrics.dead_share,
            share_above_10_percent=metrics.share_above_10_percent,
            delta_loss=delta_loss,
        )
        points.append(point)
        record = {"kind": "l0_sweep", "source": str(source), **dataclasses.asdict(point)}
        record |= {"settings": settings, "provenance": provenance(seed=settings.seed)}
        append_jsonl(output / RECORD_FILENAME, record)
    points.sort(key=lambda point: point.target_l0)
    for warning in sweep_warnings(points):
        logger.warning(warning)
    return points


def require_empty_folder(output: str | Path) -> None:
    """Raise ValueError unless the folder of a sweep is new or empty."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; give another folder")


def frontier_table(points: Sequence[SweepPoint]) -> Table:
    """The points as a table for the terminal."""
    table = Table(title="L0 sweep, on held-out tokens")
    columns = (
        "target L0",
        "L0",
        "FVU",
        "FVU, thresholds shifted",
        "delta LM loss",
        "dead",
        "> 10 %",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            f"{point.target_l0:g}",
            f"{point.l0:.2f}",
            f"{point.fvu:.4f}",
            f"{point.shifted_fvu:.4f}",
            "-" if point.delta_loss is None else f"{point.delta_loss:.4f}",
            f"{point.dead_share:.2%}",
            f"{point.share_above_10_percent:.2%}",
        )
    return table


def sweep_warnings(points: Sequence[SweepPoint]) -> list[str]:
    """What is wrong with points in order of ascending L0, and what to do about it."""
    warnings = [
        f"with target L0 {point.target_l0:g}, L0 is {point.l0:.4g} on held-out tokens "
        f"({point.relative_error:.1%} off): fit on more tokens of the same kind of text"
        for point in points
        if point.relative_error > L0_TOLERANCE
    ]
    warnings += [
        f"with target L0 {point.target_l0:g}, the error is higher than with shifted thresholds "
        f"(FVU {point.fvu:.4f} and {point.shifted_fvu:.4f}): train for more steps, or with a "
        "lower lr"
        for point in points
        if point.fvu > 1.01 * point.shifted_fvu
    ]
    for lower, upper in zip(points, points[1:], strict=False):
        if upper.fvu >= lower.fvu:
            warnings.append(
                f"target L0 {upper.target_l0:g} has no lower error than L0 {lower.target_l0:g} "
                f"(FVU {upper.fvu:.4f} and {lower.fvu:.4f}): the activations that lower thresholds "
                "add are noise. Train the decoder or all parameters too, for more steps"
            )
    return warnings


def _check_activations(name: str, activations: Tensor, d_in: int) -> None:
    if activations.ndim != 2 or activations.shape[1] != d_in:
        raise ValueError(
            f"{name} has shape {tuple(activations.shape)}; the dictionary takes [tokens, {d_in}]"
        )
    if not torch.isfinite(activations).all():
        raise ValueError(
            f"{name} holds NaN or infinite activations; run the model in float32 or bfloat16, or "
            "leave out the tokens that overflow"
        )


def _as_sae(dictionary: Dictionary, parameters: Parameters) -> Any:
    return dataclasses.replace(dictionary, parameters=parameters).as_sae()


def _describe(sae: Any, target: float, metrics: Metrics, source: str | Path) -> None:
    """Put what is the point's own in place of what the metadata says of the source."""
    metadata = sae.cfg.metadata
    metadata.refitted_from = str(source)
    metadata.l0 = metrics.l0
    metadata.num_dead_features = round(metrics.dead_share * sae.cfg.d_sae)
    details = metadata.training_architecture_details
    if isinstance(details, dict):
        metadata.training_architecture_details = {**details, "target_l0": target}
