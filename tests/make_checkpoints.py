"""Make the checkpoints of `interrupted_runs.py`: `python -m tests.make_checkpoints`.

Only where the format of a checkpoint is to change: a version of the package that cannot go on with
the committed ones loses its users' runs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.interrupted_runs import CHECKPOINTS, KINDS, stop_halfway, tiny_model

if __name__ == "__main__":
    torch.set_num_threads(1)
    CHECKPOINTS.mkdir()  # they are not made over those that are there
    model = tiny_model()
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # what is saved names its own folder: not one of this machine
            stop_halfway(kind, Path(name), model)
            shutil.copytree(name, CHECKPOINTS / name, dirs_exist_ok=True)
            kind.run(Path(name), model)
            outputs = kind.outputs(Path(name))
            os.chdir(CHECKPOINTS)
        outputs = {key: value.detach().contiguous() for key, value in outputs.items()}
        save_file(outputs, CHECKPOINTS / name / "expected.safetensors")
        files = [file for file in (CHECKPOINTS / name).rglob("*") if file.is_file()]
        print(f"{name}: {sum(file.stat().st_size for file in files) / 1e3:.0f} kB")
