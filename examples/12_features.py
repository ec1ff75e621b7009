"""A page to browse a dictionary with: output/12_features.html, which opens without a network."""

import subprocess
import sys
from pathlib import Path

import torch
from sae_lens import SAE

from jumprelu_plugin.analysis.dashboard import write_dashboard
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import tokenized_dataset

SAE_FOLDER = Path("output/01_train")
SEQUENCES = 96  # held-out text to look for examples in; more is better and slower

if not (SAE_FOLDER / "cfg.json").exists():
    subprocess.run([sys.executable, Path(__file__).with_name("01_train.py")], check=True)

model = load_model("tiny-gemma-2")
sae = SAE.load_from_disk(SAE_FOLDER)
text = tokenized_dataset(model.tokenizer, 128, split="test")
tokens = torch.tensor(text[:SEQUENCES]["tokens"])
page = write_dashboard("output/12_features.html", model, sae, tokens, facts={"trained by": "01"})
print(f"open {page} in a browser ({page.stat().st_size / 1e6:.1f} MB, {sae.cfg.d_sae} latents)")
