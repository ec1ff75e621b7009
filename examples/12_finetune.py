"""Finetune a trained SAE: from Gemma Scope's file format, at the L0 it has.

The file stands for one from a hub: it is the SAE of 01_train.py, exported. On the command line:
jumprelu finetune PARAMS.npz --hook_name HOOK --model_name MODEL --training_tokens 1000000 ...
Writes ./output/12_finetune.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig

from jumprelu_plugin import (
    FinetuningRunner,
    JumpReLUTrainingSAEConfig,
    corpus,
    evaluate,
    export,
    load_model,
    tokenized_dataset,
)

SAE_FOLDER = Path("output/01_train")
OUTPUT = Path("output/12_finetune")
STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "40"))

if not (SAE_FOLDER / "cfg.json").exists():
    subprocess.run([sys.executable, Path(__file__).with_name("01_train.py")], check=True)
shutil.rmtree(OUTPUT, ignore_errors=True)  # a used output folder is refused
export(SAE_FOLDER, "gemma-scope", OUTPUT / "released")

model = load_model("tiny-gemma-2")
cfg = LanguageModelSAERunnerConfig(
    # The file knows its widths. Without a target, training holds the L0 that the SAE has.
    sae=JumpReLUTrainingSAEConfig(d_in=256, d_sae=1024),
    model_name="tiny-gemma-2",
    hook_name="blocks.3.hook_resid_post",
    training_tokens=STEPS * 1024,
    train_batch_size_tokens=1024,
    context_size=128,
    n_batches_in_buffer=32,
    n_batches_for_norm_estimate=5,
    exclude_special_tokens=True,
    lr=3e-4,  # smaller than from scratch
    lr_decay_steps=STEPS // 2,
    checkpoint_path=None,
    output_path=str(OUTPUT / "finetuned"),
    verbose=False,
    logger=LoggingConfig(log_to_wandb=False),
)
text = tokenized_dataset(model.tokenizer, 128, "train", corpus()[:200])
runner = FinetuningRunner(
    OUTPUT / "released" / "params.npz", cfg, override_dataset=text, override_model=model, log=print
)
runner.run()

held_out = torch.tensor(tokenized_dataset(model.tokenizer, 128, "test")[:16]["tokens"])
for name, folder in (("released", SAE_FOLDER), ("finetuned", OUTPUT / "finetuned")):
    found = evaluate(model, SAE.load_from_disk(folder), held_out)
    print(f"{name}: L0 {found.l0:.1f}, FVU {found.fvu:.3f}, delta LM loss {found.delta_loss:.3f}")
