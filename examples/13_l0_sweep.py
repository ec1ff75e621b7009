"""Refit one SAE to several L0s; each point of the sweep is a stock SAELens folder.

On the command line: jumprelu l0-sweep output/01_train --l0 16,48 --output_path output/sweep
Writes ./output/13_l0_sweep.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from sae_lens import SAE

from jumprelu_plugin import (
    RefitSettings,
    corpus,
    harvest_activations,
    load_model,
    run_l0_sweep,
    tokenized_dataset,
)

SAE_FOLDER = Path("output/01_train")
OUTPUT = Path("output/13_l0_sweep")
STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "40"))

if not (SAE_FOLDER / "cfg.json").exists():
    subprocess.run([sys.executable, Path(__file__).with_name("01_train.py")], check=True)
shutil.rmtree(OUTPUT, ignore_errors=True)

metadata = SAE.load_from_disk(SAE_FOLDER).cfg.metadata
model = load_model(metadata.model_name)
special = model.tokenizer.all_special_ids
documents = corpus()[::4]


def tokens(split: str, sequences: int) -> torch.Tensor:
    text = tokenized_dataset(model.tokenizer, 128, split, documents).shuffle(0)
    return torch.tensor(text[:sequences]["tokens"])


def harvest(text: torch.Tensor) -> torch.Tensor:
    return harvest_activations(model, metadata.hook_name, text, special_token_ids=special)


held_out = tokens("test", 24)
# "thresholds" keeps every direction bit for bit; "all" gives the lowest FVU.
settings = RefitSettings(train="all", steps=STEPS, batch_tokens=1024)
points = run_l0_sweep(
    SAE_FOLDER,
    [16, 48],
    OUTPUT,
    activations=harvest(tokens("train", 64)),
    held_out=harvest(held_out),
    settings=settings,
    model=model,
    tokens=held_out[:8],
    log=print,
)
for point in points:
    print(f"{point.folder}: L0 {point.l0:.1f}, FVU {point.fvu:.3f}, dead {point.dead_share:.1%}")
