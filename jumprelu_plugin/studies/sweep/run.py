"""Runs a sweep: activations once, then every cell that has no record yet.

    FOLDER/sweep.json         what is the same for all SAEs
    FOLDER/activations/       the activation cache, unless another one is read
    FOLDER/saes/HOOK/ARCHITECTURE/l0_…_seed_…_lr_…/    each SAE as SAELens saves it, and record.json
    FOLDER/records.jsonl      the record of every finished SAE, a line each

An SAE's folder appears at once and with its record in it; the line follows. A process that is
killed at any moment therefore leaves whole SAEs, and at most one whose line is missing: it is added
when the sweep goes on. Cells that were not finished are trained from their beginning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.evaluation.splicing import special_token_ids_of
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.hooks import hook_point
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import keywords_to_record, named_model
from jumprelu_plugin.models.sequences import held_out_beside, read_sequences
from jumprelu_plugin.records import provenance, whole_folder, write_json
from jumprelu_plugin.studies.sweep.cells import TrainedCell, learning_rate_of, train_cells
from jumprelu_plugin.studies.sweep.grid import Cell, SweepSettings
from jumprelu_plugin.studies.sweep.groups import group_cells, largest_group
from jumprelu_plugin.studies.sweep.measures import (
    density_histogram,
    threshold_histogram,
    uniformity_of_importance,
)
from jumprelu_plugin.studies.sweep.record_file import (
    Record,
    append_record,
    without_broken_line,
)
from jumprelu_plugin.studies.sweep.training import as_saved
from jumprelu_plugin.training.activations.cache.reader import ActivationCache
from jumprelu_plugin.training.activations.cache.store import require_same_model
from jumprelu_plugin.training.activations.cache.writer import write_activation_cache
from jumprelu_plugin.training.interruption import InterruptedException

RECORDS_FILENAME = "records.jsonl"
SETTINGS_FILENAME = "sweep.json"
RECORD_FILENAME = "record.json"
_UNIFORMITY_SEQUENCES = 32


@dataclass(frozen=True)
class _Material:
    """What all cells share.

    Attributes:
        held_out: sequences for evaluation.
        digests: of the model and of the held-out text.
    """

    model: Any
    cache: ActivationCache
    held_out: Int[Tensor, "sequences positions"]
    digests: dict[str, str]


def run_sweep(
    output_path: str | Path, settings: SweepSettings, *, console: Console | None = None
) -> Path:
    """Train and measure every cell of a sweep that has no record yet.

    The same call goes on where an earlier one was stopped, and adds cells to a finished sweep.

    Args:
        output_path: the sweep's folder.
        settings: the grid.
        console: where progress is shown.

    Returns:
        The file of records.

    Raises:
        ValueError: the folder holds a sweep with other settings, or a broken record before its last
            line; an activation cache or a hook that does not fit; and as `named_model` does.
        OSError: the disk is too small for the activations, or the model cannot be had.
        InterruptedException: after Ctrl-C.
    """
    output_path, console = Path(output_path), console or Console()
    require_device(settings.device)
    _refuse_other_settings(output_path, settings)
    for leftover in output_path.glob("saes/*/*/.l0_*"):  # of a process that was killed
        shutil.rmtree(leftover)
    records = output_path / RECORDS_FILENAME
    todo = _cells_without_record(output_path, settings, console)
    if not todo:
        console.print(f"all {len(settings.cells())} SAEs have their records", highlight=False)
        return records
    material = _prepare(output_path, settings, console)
    if not (output_path / SETTINGS_FILENAME).exists():
        write_json(output_path / SETTINGS_FILENAME, settings.fixed())
    try:
        with _progress(console) as progress:
            bar = progress.add_task("SAEs", total=len(settings.cells()))
            progress.advance(bar, len(settings.cells()) - len(todo))
            for group in group_cells(todo, settings):
                for cell, record in _run_group(output_path, group, settings, material, progress):
                    append_record(records, record)
                    progress.advance(bar)
                    progress.console.print(_line(cell, record), highlight=False)
    except KeyboardInterrupt:
        raise InterruptedException(
            "interrupted; the same command goes on with the SAEs that have no record"
        ) from None
    return records


def _refuse_other_settings(folder: Path, settings: SweepSettings) -> None:
    path = folder / SETTINGS_FILENAME
    if not path.exists():
        return
    there, here = json.loads(path.read_text(encoding="utf-8")), settings.fixed()
    different = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{folder} holds a sweep with other settings ({'; '.join(different)}): give another "
            "folder, or the same settings"
        )


# ---------------------------------------------------------------- what is there


def _cells_without_record(folder: Path, settings: SweepSettings, console: Console) -> list[Cell]:
    path = folder / RECORDS_FILENAME
    records, broken = without_broken_line(path)
    if broken is not None:
        console.print(
            f"the last line of {path} was broken and is now in {path.name}.broken", highlight=False
        )
    known = {_key(record) for record in records}
    todo: list[Cell] = []
    for cell in settings.cells():
        if _key_of(cell) in known:
            continue
        saved = folder / "saes" / cell.name / RECORD_FILENAME
        if saved.exists() and _key(found := json.loads(saved.read_text())) == _key_of(cell):
            append_record(path, found)
            console.print(f"{cell.name}: its record was missing and is added", highlight=False)
        else:
            todo.append(cell)
    return todo


def _key(record: Record) -> tuple[Any, ...]:
    varied = tuple(record.get(n) for n in ("site", "architecture", "target_l0", "seed"))
    return *varied, None if record.get("lr_by_rule") else record.get("lr")


def _key_of(cell: Cell) -> tuple[Any, ...]:
    return cell.hook, cell.architecture, cell.target_l0, cell.seed, cell.lr


# ---------------------------------------------------------------- what all cells share


def _prepare(folder: Path, settings: SweepSettings, console: Console) -> _Material:
    given = None if settings.activations is None else ActivationCache(settings.activations)
    if given is not None:
        for hook in settings.hooks:
            given.width(hook)
    model = named_model(settings)
    for hook in settings.hooks:
        hook_point(model, hook)
    if given is None:
        tokens = settings.cached_tokens or settings.training_tokens
        text, held_out = read_sequences(
            model,
            settings.dataset_path,
            context_size=settings.context_size,
            held_out=settings.held_out,
            train=-(-tokens // settings.context_size),
        )
        write_activation_cache(
            folder / "activations",
            model,
            settings.hooks,
            text,
            model_name=settings.model_name,
            model_class_name=settings.model_class_name,
            dataset_path=settings.dataset_path,
            dtype=settings.cache_dtype,
            log=lambda message: console.print(message, highlight=False),
        )
    else:
        require_same_model(given, model)
        held_out = held_out_beside(
            model,
            settings.dataset_path,
            given.manifest.text_digest,
            given.manifest.n_sequences,
            context_size=settings.context_size,
            held_out=settings.held_out,
            prepend_bos=given.manifest.prepend_bos,
        )
    cache = given or ActivationCache(folder / "activations")
    digests = {"model_digest": model_digest(model), "data_digest": digest(held_out)}
    return _Material(model, cache, held_out, digests)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


# ---------------------------------------------------------------- one cell


def _run_group(
    folder: Path,
    cells: Sequence[Cell],
    settings: SweepSettings,
    material: _Material,
    progress: Progress,
) -> Iterator[tuple[Cell, Record]]:
    """Train cells of one hook together, as many as there is memory for, and measure each."""
    left = list(cells)
    while left:
        count = 1
        if len(left) > 1:
            l0 = max(cell.target_l0 for cell in left)
            d_in = material.cache.width(left[0].hook)
            count = largest_group(settings, d_in, l0, torch.get_num_threads())
        now, left = left[:count], left[count:]
        with _bars(progress, now, settings.steps) as advance:
            trained = train_cells(now, settings, material.cache, advance)
        for cell in now:
            yield cell, _finish(folder, cell, trained.pop(0), settings, material)


def _finish(
    folder: Path, cell: Cell, trained: TrainedCell, settings: SweepSettings, material: _Material
) -> Record:
    """Save and measure one SAE; its folder appears with its record in it."""
    run = trained.run
    with whole_folder(folder / "saes" / cell.name, replaces=True) as unfinished:
        _describe(trained.sae, cell, settings, material.cache)
        saved = as_saved(trained.sae, trained.center, unfinished).to(settings.device)
        record = {
            "model": settings.model_name,
            "site": cell.hook,
            "architecture": cell.architecture,
            "target_l0": cell.target_l0,
            "seed": cell.seed,
            "d_in": trained.sae.cfg.d_in,
            "d_sae": settings.d_sae,
            "steps": settings.steps,
            "batch": settings.train_batch_size_tokens,
            "lr": learning_rate_of(cell, settings, trained.sae.cfg.d_in),
            "lr_by_rule": cell.lr is None,
            "cache_dtype": material.cache.manifest.dtype,
            "seconds": run.seconds,
            "cpu_seconds": run.cpu_seconds,
            "peak_memory_bytes": trained.memory,
            "trained_together": run.trained_together,
            **_measure(saved, cell, material),
            "dynamics": run.dynamics,
            "folder": f"saes/{cell.name}",
            "provenance": provenance(seed=cell.seed, **material.digests),
        }
        write_json(unfinished / RECORD_FILENAME, record)
    return record


@contextmanager
def _bars(progress: Progress, cells: Sequence[Cell], total: int) -> Iterator[Callable[[int], None]]:
    """A bar for each cell; what is given moves that of the cell at a place one step on."""
    tasks: list[TaskID] = [progress.add_task(cell.name, total=total) for cell in cells]
    try:
        yield lambda place: progress.advance(tasks[place])
    finally:
        for task in tasks:
            progress.remove_task(task)


def _describe(sae: Any, cell: Cell, settings: SweepSettings, cache: ActivationCache) -> None:
    """What SAELens' runner records of an SAE's place, so that other commands know it."""
    if cell.hook.endswith("hook_z"):
        sae.cfg.reshape_activations = "hook_z"  # it was trained on flattened heads
    metadata = sae.cfg.metadata
    metadata.model_name = settings.model_name
    metadata.model_class_name = settings.model_class_name
    metadata.model_from_pretrained_kwargs = keywords_to_record(settings)
    metadata.hook_name = cell.hook
    metadata.dataset_path = settings.dataset_path
    metadata.context_size = settings.context_size
    metadata.prepend_bos = cache.manifest.prepend_bos
    metadata.exclude_special_tokens = bool(cache.manifest.excluded_tokens)


def _measure(sae: Any, cell: Cell, material: _Material) -> Record:
    model, tokens = material.model, material.held_out
    found = evaluate(model, sae, tokens, hook_in=cell.hook)
    return {
        "fvu": found.fvu,
        "l0": found.l0,
        "relative_error": abs(found.l0 / cell.target_l0 - 1),
        "dead_share": found.dead_share,
        "share_above_1_percent": found.share_above_1_percent,
        "share_above_10_percent": found.share_above_10_percent,
        "delta_lm_loss": found.delta_loss,
        "loss_clean": found.loss_clean,
        "loss_recovered": found.fraction_recovered,
        "held_out_tokens": found.n_tokens,
        "uniformity": uniformity_of_importance(
            model,
            sae,
            tokens[:_UNIFORMITY_SEQUENCES],
            hook=cell.hook,
            special_token_ids=special_token_ids_of(model, None),
        ),
        "density_histogram": density_histogram(found.firing_frequency),
        "threshold_histogram": threshold_histogram(sae),
    }


def _line(cell: Cell, record: Record) -> str:
    return (
        f"{cell.name}: L0 {record['l0']:.1f}, FVU {record['fvu']:.4f}, delta LM loss "
        f"{record['delta_lm_loss']:.4f}, dead {record['dead_share']:.1%}, "
        f"{record['seconds']:.0f} s"
    )
