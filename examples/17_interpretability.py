"""Make a blind rating set of an SAE's latents. Writes ./output/17_rating and its key."""

import subprocess
import sys
from pathlib import Path

from jumprelu_plugin import RatingStudySettings, make_rating_study

SAE_FOLDER = Path("output/01_train")
OUTPUT = Path("output/17_rating")

if not (SAE_FOLDER / "cfg.json").exists():
    subprocess.run([sys.executable, Path(__file__).with_name("01_train.py")], check=True)

# Give several folders to compare SAEs; "label=folder" names the group of each.
settings = RatingStudySettings(latents=12, contexts=8, sequences=64, raters="anna,ben,chris")
if not OUTPUT.exists():
    make_rating_study([f"jumprelu={SAE_FOLDER}"], OUTPUT, settings=settings, log=print)

print(f"rate:    jumprelu study serve {OUTPUT}")
print(f"unblind: jumprelu study report {OUTPUT}")
# A language model's explanations of the same SAE, scored beside their nulls:
print(f"explain: jumprelu study explain jumprelu={SAE_FOLDER} --output_path output/17_explained")
