"""The flags of a short run over `folders`, and which files there are afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import D_MODEL, RESIDUAL


def flags(folders: Path, folder: Path, **changes: Any) -> list[str]:
    """A run that works, with something changed; None takes a flag away."""
    values = {
        "model_name": folders / "model",
        "dataset_path": folders / "text",
        "streaming": False,
        "hook_name": RESIDUAL,
        "d_in": D_MODEL,
        "d_sae": 41,
        "target_l0": 7,
        "training_tokens": 3 * 31,
        "train_batch_size_tokens": 31,
        "context_size": 13,
        "n_batches_in_buffer": 17,
        "n_batches_for_norm_estimate": 2,
        "log_to_wandb": False,
        "verbose": False,
        "checkpoint_path": folder / "checkpoints",
        "output_path": folder / "output",
        **changes,
    }
    return [
        text
        for name, value in values.items()
        if value is not None
        for text in (f"--{name}", str(value).format(root=folders))
    ]


def files(*folders: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }
