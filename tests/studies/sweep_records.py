"""Records as a sweep writes them, made up: two sites, three architectures, three L0s, two seeds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SITES = ("blocks.2.hook_resid_post", "blocks.2.attn.hook_z")
NAMES = ("topk", "jumprelu-plugin", "standard")
TARGETS, SEEDS = (10.0, 20.0, 50.0), (0, 1)


def sweep_records() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        _record(draw, site, name, target, seed)
        for site in SITES
        for name in NAMES
        for target in TARGETS
        for seed in SEEDS
    ]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _record(draw: random.Random, site: str, name: str, target: float, seed: int) -> dict[str, Any]:
    thresholds = name == "jumprelu-plugin"
    dynamics = [
        {
            "step": step,
            "l0": target * (1 + 9 / step),
            "fvu": 0.1 + 1 / step,
            "dead_share": 0.0,
            "coefficient": None if name == "topk" else 0.01 * step,
            "threshold_quantiles": [0.1, 0.2, 0.3, 0.4, 0.5] if thresholds else None,
        }
        for step in (1, 10, 20, 30)
    ]
    counts = [draw.randrange(5) for _ in range(60)]
    return {
        "model": "tiny",
        "site": site,
        "architecture": name,
        "target_l0": target,
        "seed": seed,
        "steps": 30,
        "seconds": 3.0 + seed,
        "peak_memory_bytes": 200_000_000,
        "l0": target * (1 + 0.02 * seed),
        "fvu": 0.5 / target + 0.01 * seed,
        "delta_lm_loss": 1.7 / target + 0.03 * seed,
        "dead_share": 0.125,
        "share_above_10_percent": 0.0625,
        "uniformity": 0.75,
        "density_histogram": counts,
        "threshold_histogram": {"edges": [0.1, 0.2, 0.4], "counts": [3, 5]} if thresholds else None,
        "dynamics": dynamics,
        "provenance": {"git": {"commit": "0123456789abcdef"}, "hardware": {"cpu": "A <CPU>"}},
    }
