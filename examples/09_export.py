"""Write an SAE in other tools' formats, and read one of them back.

Every export is loaded with the tool's own loader and compared before its folder appears. If the
tool is not installed, the error says how to install it; tools/circuit_env.sh installs all of them.
Writes ./output/09_export.
"""

import subprocess
import sys
from pathlib import Path

import torch
from sae_lens import SAE

from jumprelu_plugin import export, load_dictionary

SAE_FOLDER = Path("output/01_train")
OUTPUT = Path("output/09_export")

if not (SAE_FOLDER / "cfg.json").exists():
    subprocess.run([sys.executable, Path(__file__).with_name("01_train.py")], check=True)

for target in ("saelens", "gemma-scope", "gemma-scope-2", "dictionary-learning", "neuronpedia"):
    try:
        print(f"{target}: {export(SAE_FOLDER, target, OUTPUT / target)}")
    except ImportError as missing:
        print(f"{target}: {missing}")

# Read one back. Gemma Scope's file holds arrays alone: give its hook and its model.
sae = SAE.load_from_disk(SAE_FOLDER)
hook, model = sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name
back = load_dictionary(OUTPUT / "gemma-scope", hook_name=hook, model_name=model).as_sae()
x = 10 * torch.randn(64, sae.cfg.d_in)
with torch.no_grad():
    gap = float((back(x) - sae(x)).norm() / sae(x).norm())
print(f"read back from Gemma Scope's format as {type(back).__name__}: outputs differ by {gap:.1e}")
