"""The most memory a training will take, from its sizes, and what the machine has.

A run has four moments that could be its peak: when it calibrates on its first batch, in a step,
while it draws activations, and while it writes a checkpoint. Between them weights, Adam's moments
and the mixing buffer stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The counts below reproduce the peak resident memory of real runs (docs/guides/monitoring.md).
# Arrays [batch, d_sae] that exist together at the widest point of a dense step: 9 of the step,
# z, activations, gates, windows and their gradients (measured at d_in 33, d_sae 32,749 and 601
# tokens), and 2 that the last step left for the log.
DENSE_ARRAYS = 11
# The same where z is calibrated before the first step, and there are no gradients or moments yet.
CALIBRATION_ARRAYS = 2
# Bytes of a kept pair in the sparse step: place, row and column, several times (8 bytes each), z,
# activation, gate and their gradients (4 each).
BYTES_PER_ENTRY = 145
# What the sparse step takes at one time beside its entries (`step.select`).
TILE_BYTES = {"cpu": 2**25}
TILE_BYTES_ELSEWHERE = 2**29
# Copies of the mixing buffer while it is filled: what waited, the new rows, joined, shuffled.
BUFFER_COPIES = 3.5


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on one device at the peak of a run.

    Attributes:
        device: its name.
        there: taken before the training starts: the process, the model, the SAE's weights.
        optimizer: gradients and Adam's two moments.
        buffer: the mixing buffer, once.
        moment: which moment is the peak: "step", "calibration", "drawing" or "saving".
        working: what that moment takes beside the parts above, less gradients where there are none.
        available: what the machine has left for it now, `there` included; None if it is not known.
    """

    device: str
    there: int
    optimizer: int
    buffer: int
    moment: str
    working: int
    available: int | None

    @property
    def peak(self) -> int:
        return self.there + self.optimizer + self.buffer + self.working

    def largest(self) -> str:
        """The part that is largest, by name."""
        parts = {"optimizer": self.optimizer, "buffer": self.buffer, self.moment: self.working}
        return max(parts, key=lambda part: parts[part])


def forecast(
    cfg: Any, sae: Any, model: Any, entries: float, *, calibrates: bool, width: int
) -> MemoryForecast:
    """Memory of a training on the device of its SAE.

    Args:
        cfg: SAELens' runner config.
        entries: pairs a token that the sparse step keeps; d_sae if not known.
        calibrates: whether the first step measures z first.
        width: of the rows in the mixing buffer.
    """
    device = torch.device(cfg.device)
    parameters = sum(p.numel() * p.element_size() for p in sae.parameters())
    rows = cfg.n_batches_in_buffer * cfg.context_size
    per_pass = cfg.store_batch_size_prompts * cfg.context_size
    here = _same(device, cfg.act_store_device)
    buffer = 4 * rows * width if here else 0
    forward = 4 * _forward_numbers(cfg, model, width) if _same(device, cfg.llm_device) else 0
    one_pass = 4 * per_pass * width if here else 0
    batch = cfg.train_batch_size_tokens
    array = 4 * batch * sae.cfg.d_sae
    moments = {
        # The SAE's tangential gradients and the like take one more copy of a matrix or two.
        "step": _step_bytes(cfg, sae, entries, device) + parameters + 16 * batch * width,
        "calibration": CALIBRATION_ARRAYS * array * calibrates - 3 * parameters,
        # No gradients exist while activations are drawn, or while a checkpoint is written.
        "drawing": max(int((BUFFER_COPIES - 1) * buffer), forward) + one_pass - parameters,
        "saving": buffer if cfg.n_checkpoints else 0,
    }
    moment = max(moments, key=lambda name: moments[name])
    return MemoryForecast(
        device=str(device),
        there=taken(device),
        optimizer=3 * parameters,
        buffer=buffer,
        moment=moment,
        working=moments[moment],
        available=available(device),
    )


def _same(device: torch.device, other: str | None) -> bool:
    return other is None or torch.device(other).type == device.type


def _step_bytes(cfg: Any, sae: Any, entries: float, device: torch.device) -> int:
    batch, path = cfg.train_batch_size_tokens, getattr(sae.cfg, "step_kernel", "dense")
    dense = 4 * DENSE_ARRAYS * batch * sae.cfg.d_sae
    tile = TILE_BYTES.get(device.type, TILE_BYTES_ELSEWHERE)
    sparse = int(BYTES_PER_ENTRY * entries * batch) + tile
    if path == "screened" or path == "auto":  # both matrices once more, in bfloat16
        sparse += 2 * (batch + sae.cfg.d_sae) * sae.cfg.d_in
    if path == "dense":
        return dense
    # "auto" tries the dense step where it could be faster, which it is not where little is active.
    could_be_dense = path == "auto" and entries > 0.05 * sae.cfg.d_sae
    return max(sparse, dense) if could_be_dense else sparse


def _forward_numbers(cfg: Any, model: Any, width: int) -> int:
    """Numbers of a forward pass of the model: the hook, a block's own, attention scores."""
    sizes: Mapping[str, Any] = vars(getattr(model, "cfg", object)) if model is not None else {}
    d_model, d_mlp, heads = (sizes.get(name) or 0 for name in ("d_model", "d_mlp", "n_heads"))
    a_token = 2 * width + 3 * d_mlp + 8 * d_model + 3 * heads * cfg.context_size
    return cfg.store_batch_size_prompts * cfg.context_size * a_token


def size(count: float) -> str:
    """A number of bytes, for reading."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def taken(device: torch.device) -> int:
    """Bytes this process holds on a device now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available(device: torch.device) -> int | None:
    """Bytes this process could hold on a device, with what it holds now; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = [room for room in (_free_memory(), _free_in_group()) if room is not None]
    return min(free) + taken(device) if free else None


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)}
    return 1024 * int(sizes["MemAvailable"]) if "MemAvailable" in sizes else None


def _free_in_group() -> int | None:
    """Under the limit of a container: control groups, version 2 or 1."""
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path(folder, name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        # Files the kernel caches count as used, and are given back on demand.
        return None if most == "max" else int(most) - int(now) + _cached(folder)
    return None


def _cached(folder: str) -> int:
    try:
        lines = Path(folder, "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    sizes = dict(line.split()[:2] for line in lines)
    return int(sizes.get("inactive_file", sizes.get("total_inactive_file", 0)))
