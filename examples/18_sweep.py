"""Train a small grid of SAEs on one activation cache, and draw its figures.

On the command line:

    jumprelu sweep --architectures jumprelu-plugin,topk --l0 10,40 --layers 2 --d_sae 512 \\
        --output_path output/18_sweep/sweep
    jumprelu plot output/18_sweep/sweep --output_path output/18_sweep/figures
"""

import os
from pathlib import Path

from jumprelu_plugin import SweepSettings, plot_sweep, run_sweep

STEPS = int(os.environ.get("JUMPRELU_EXAMPLE_STEPS", "400"))
OUTPUT = Path("output/18_sweep")

# Interrupted, the same call goes on with the SAEs that have no record.
settings = SweepSettings(
    architectures=("jumprelu-plugin", "topk"),
    l0=(10, 40),
    layers=(2,),
    d_sae=512,
    training_tokens=1024 * STEPS,
    cache_dtype="int8",
    held_out=12,
)
records = run_sweep(OUTPUT / "sweep", settings)
report = plot_sweep([records], OUTPUT / "figures")
print(f"open {report}")
