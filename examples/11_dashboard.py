"""Write a searchable page of a dictionary's latents. Writes ./output/11_dashboard.html."""

import subprocess
import sys
from pathlib import Path

import torch
from sae_lens import SAE

from jumprelu_plugin import load_model, tokenized_dataset, write_dashboard

SAE_FOLDER = Path("output/01_train")
SEQUENCES = 96  # held-out sequences to search for examples; more is better and slower

if not (SAE_FOLDER / "cfg.json").exists():
    subprocess.run([sys.executable, Path(__file__).with_name("01_train.py")], check=True)

model = load_model("tiny-gemma-2")
sae = SAE.load_from_disk(SAE_FOLDER)
text = tokenized_dataset(model.tokenizer, 128, split="test")
tokens = torch.tensor(text[:SEQUENCES]["tokens"])
page = write_dashboard("output/11_dashboard.html", model, sae, tokens, facts={"trained by": "01"})
print(f"open {page} in a browser ({page.stat().st_size / 1e6:.1f} MB, {sae.cfg.d_sae} latents)")
