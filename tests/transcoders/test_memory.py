"""The memory that runs over layers say they will take is what they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MEASURE = """
import json, sys
from pathlib import Path
from tests.transcoders.test_memory import measure
measure(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
"""
POSITIONS = 13
# What libraries load and set up on first use, beyond what is there when the model is.
FIRST_USE = 25e6


def measure(folder: Path, kind: str, changes: dict[str, Any]) -> None:
    """In a process of its own: train, and print what was stated and what the run took."""
    from dataclasses import replace
    from types import MappingProxyType

    import torch
    from datasets import Dataset

    from jumprelu_plugin import recipes
    from jumprelu_plugin.transcoders.clt.run import CLTSettings, train_clt
    from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings, train_transcoders
    from tests.tiny import tiny_hf, tiny_hooked, tiny_tokenizer, tiny_tokens

    torch.set_num_threads(1)
    model = tiny_hooked(tiny_hf(), tiny_tokenizer(folder / "tokenizer"))
    text = Dataset.from_dict({"tokens": tiny_tokens(997, POSITIONS).tolist()})
    kernel = changes.pop("step_kernel")
    fields: dict[str, Any] = {
        "target_l0": 7.0,
        "context_size": POSITIONS,
        "store_batch_size_prompts": 5,
        "n_batches_in_buffer": 400,
        "n_batches_for_norm_estimate": 3,
        "n_checkpoints": 0,
        "lr": 3e-3,
        **changes,
    }
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    output = folder / "out"
    if kind == "set":
        recipe = recipes.TRANSCODER
        sae = MappingProxyType({**recipe.sae, "step_kernel": kernel})
        recipes.RECIPES["transcoder"] = replace(recipe, sae=sae)
        train_transcoders(output, TranscoderSettings(**fields), model=model, dataset=text)
    else:
        train_clt(output, CLTSettings(**fields, step_kernel=kernel), model=model, dataset=text)
    peak = _status("VmHWM")
    name = "transcoders.json" if kind == "set" else "cross_layer_record.json"
    record = json.loads((output / name).read_text())
    stated = record["memory_estimate"]["total"] - record["memory_estimate"]["model"]
    print(json.dumps([stated, peak - before]))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = (1024 * int(line.split()[1]) for line in lines if line.startswith(name))
    return size


STEP = {
    "d_sae": 16381,
    "train_batch_size_tokens": 601,
    "training_tokens": 2 * 601,  # Adam's moments are there from the second step on
    "step_kernel": "dense",
}
CALIBRATION = {
    "d_sae": 32749,
    "train_batch_size_tokens": 1201,
    "training_tokens": 2 * 1201,
    "step_kernel": "sparse",
}
ENTRIES = {
    "d_sae": 1009,
    "train_batch_size_tokens": 2003,
    "training_tokens": 3 * 2003,
    "target_l0": 150.0,
    "step_kernel": "sparse",
}
DRAWING = {
    "d_sae": 59,
    "train_batch_size_tokens": 41,
    "training_tokens": 5 * 41,
    "n_batches_in_buffer": 40_000,
    "store_batch_size_prompts": 2999,
    "step_kernel": "sparse",
}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("set", STEP, id="step-set"),
        *(
            pytest.param(kind, changes, id=f"{name}-{kind}", marks=pytest.mark.slow)
            for name, changes, kinds in (
                ("step", STEP, ["clt"]),  # in .ci/run
                ("calibration", CALIBRATION, ["set", "clt"]),
                ("entries", ENTRIES, ["set", "clt"]),
                ("drawing", DRAWING, ["set", "clt"]),
            )
            for kind in kinds
        ),
    ],
)
def test_stated_memory_is_what_a_run_takes(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    project = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), kind, json.dumps(changes)],
        # glibc then gives back what is freed; otherwise it keeps blocks of up to 32 MB.
        env={**os.environ, "PYTHONPATH": str(project), "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stated, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured > 150e6  # there is something to predict
    assert measured / 1.3 < stated + FIRST_USE < 1.3 * measured
