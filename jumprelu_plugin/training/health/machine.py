"""What memory the machine has, and how much of it this process holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch


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
