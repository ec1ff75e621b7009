"""The checkpoint that a run resumes: `auto` takes the newest whole one of the same run.

SAELens saves a run's checkpoints in checkpoint_path/ID, with a new ID at each start. The runs below
checkpoint_path are told apart by the config that is saved with each checkpoint.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_lens import logger
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from jumprelu_plugin.training.checkpoints import (
    MANIFEST_FILENAME,
    damage,
    is_as_written,
    newest_whole,
    numbered,
)
from jumprelu_plugin.training.health.schedule import repaired

AUTO = "auto"
# What may differ between two starts of one run: where and how it runs, and what it reports.
_FREE = (
    "resume_from_checkpoint",
    "checkpoint_path",
    "n_checkpoints",
    "save_final_checkpoint",
    "verbose",
    "logger",
    "device",
    "llm_device",
    "act_store_device",
    "sae_lens_version",
    "sae_lens_training_version",
)


def refuse_damaged(checkpoint: str | None) -> None:
    """Raise ValueError for a checkpoint that is not as it was written; warn where nothing says how
    it was."""
    if checkpoint is None:
        return
    if not Path(checkpoint, MANIFEST_FILENAME).is_file():
        logger.warning(
            f"{checkpoint} has no {MANIFEST_FILENAME}, as SAELens' own runner writes none: whether "
            "its files are as they were written is not checked"
        )
        return
    why = damage(Path(checkpoint))
    if why is None:
        return
    folder = Path(checkpoint)
    before = [path for path in numbered(folder.parent) if path.name != folder.name]
    whole = next((path for path in reversed(before) if damage(path) is None), None)
    other = "There is no whole one beside it" if whole is None else f"Give {whole}, which is whole"
    raise ValueError(
        f"the checkpoint {checkpoint} is damaged ({why}). {other}; --resume_from_checkpoint auto "
        "takes the newest whole one of a run"
    )


def resolve_auto(cfg: Any, finetuned_from: str | None = None) -> Any:
    """The config with the checkpoint that `auto` stands for, or None where the run starts fresh.

    Any other checkpoint stays. A run that `auto` resumes saves its checkpoints beside the one that
    it resumes from. What was chosen, and why, is logged in a line. The config that is handed in
    stays as it is.

    Args:
        finetuned_from: the dictionary that the run finetunes.

    Raises:
        ValueError: there is no `checkpoint_path` to look below.
    """
    if cfg.resume_from_checkpoint != AUTO:
        return cfg
    if cfg.checkpoint_path is None:
        raise ValueError(
            "resume_from_checkpoint is 'auto', which looks below checkpoint_path, and "
            "checkpoint_path is None: give one of the two a folder"
        )
    below = Path(cfg.checkpoint_path).parent
    checkpoints = _newest_first(below)
    # A run over several dictionaries is repaired before it comes here.
    possible = (cfg, repaired(cfg)[0]) if hasattr(cfg, "sae") else (cfg,)
    source = _absolute(finetuned_from)
    wanted = [{**_identity(plain(given.to_dict())), "finetuned_from": source} for given in possible]

    def comparable(path: Path) -> dict[str, Any] | None:
        recorded = _recorded(path)
        if recorded is None:
            return None
        if finetuned_from is not None and cfg.sae.target_l0 is None:
            recorded.pop("sae.target_l0", None)  # the L0 that the dictionary was found to have
        return {**recorded, "finetuned_from": _absolute(_finetuned_from(path))}

    def is_same(path: Path) -> bool:
        recorded = comparable(path)
        if recorded is None or not is_as_written(path, RUNNER_CFG_FILENAME):
            return True  # damaged, which is said where it would be the one to take
        return recorded in wanted

    found = newest_whole(path for path in checkpoints if is_same(path))
    cfg = copy.copy(cfg)  # not dataclasses.replace, which would give the folder another ID
    cfg.resume_from_checkpoint = None if found is None else str(found)
    if found is not None:
        cfg.checkpoint_path = str(found.parent)
        logger.warning(f"resuming from {found}, of {cfg.training_tokens:,} tokens")
    else:
        candidates = ((path, comparable(path)) for path in checkpoints)
        logger.warning(f"starting fresh: {_why_fresh(below, candidates, wanted[0])}")
    return cfg


def _newest_first(below: Path) -> list[Path]:
    found = [path for run in below.glob("*") if run.is_dir() for path in numbered(run)]
    return sorted(found, key=lambda path: (int(path.name), path.stat().st_mtime), reverse=True)


def _why_fresh(
    below: Path, candidates: Iterable[tuple[Path, dict[str, Any] | None]], wanted: dict[str, Any]
) -> str:
    for path, recorded in candidates:
        if recorded is None:
            continue
        # Which dictionaries there are comes first: what is said of each follows from it.
        for name in sorted({*wanted, *recorded}, key=lambda name: (name != "saes", name)):
            if wanted.get(name) != recorded.get(name):
                return (
                    f"no checkpoint below {below} is of this run; {path}, the newest, has "
                    f"{name}={recorded.get(name)!r}, and this run {wanted.get(name)!r}"
                )
    return f"there is no whole checkpoint of this run below {below}"


def changed_settings(saved: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of a run that a checkpoint's config (`saved`) and this run's both say, and
    differently: its value and this run's, by name."""
    there, now = _identity(saved), _identity(here)
    return {
        name: (there[name], now[name])
        for name in sorted(there.keys() & now.keys())
        if there[name] != now[name]
    }


def _recorded(checkpoint: Path) -> dict[str, Any] | None:
    """The config of a checkpoint's run; None if it cannot be read."""
    saved = _read(checkpoint / RUNNER_CFG_FILENAME)
    if saved is None:
        return None
    output = saved.get("output_path")
    if isinstance(output, str):
        saved["output_path"] = os.path.join(_working_directory(checkpoint, saved), output)
    return _identity(saved)


def _working_directory(checkpoint: Path, saved: dict[str, Any]) -> str:
    """The directory that a run's relative paths started from: this one, where nothing tells."""
    given, place = saved.get("checkpoint_path"), os.path.abspath(checkpoint.parent)
    if not isinstance(given, str) or os.path.isabs(given):
        return os.curdir
    below = os.path.normpath(given)
    return place.removesuffix(below) if place.endswith(os.sep + below) else os.curdir


def _finetuned_from(checkpoint: Path) -> str | None:
    saved = _read(checkpoint / SAE_CFG_FILENAME) or {}
    metadata = saved.get("metadata")
    return metadata.get("finetuned_from") if isinstance(metadata, dict) else None


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a run the same run, flat: SAELens' fields, and an SAE's as sae.NAME, or as
    saes.DICTIONARY.NAME where there are several."""
    fields = {name: value for name, value in config.items() if name not in _FREE}
    schedule = str(fields.get("lr_scheduler_name")).lower()  # as SAELens reads it
    fields["lr_scheduler_name"] = schedule
    if schedule == "constant":
        fields.pop("lr_end", None)  # SAELens fills it in, and this schedule does not read it
    fields |= _without_free("sae", fields.pop("sae", None))
    several = fields.pop("saes", None)
    if isinstance(several, dict):
        fields["saes"] = list(several)
        for name, sae in several.items():
            fields |= _without_free(f"saes.{name}", sae)
    fields["output_path"] = _absolute(fields.get("output_path"))
    return fields


def _absolute(path: Any) -> Any:
    """A path that compares equal however it is written; what is none stays."""
    return os.path.abspath(path) if isinstance(path, str) else path


def _without_free(prefix: str, sae: Any) -> dict[str, Any]:
    """An SAE's fields that tell runs apart. None says nothing, as in a field of a later version."""
    if not isinstance(sae, dict):
        return {}
    free = (*_FREE, "metadata")
    said = {name: value for name, value in sae.items() if value is not None}
    return {f"{prefix}.{name}": value for name, value in said.items() if name not in free}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return saved if isinstance(saved, dict) else None


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config as its file holds it: tuples as lists, say."""
    return json.loads(json.dumps(config))
