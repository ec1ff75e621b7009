"""Every kernel compiles to machine code for Ampere and Hopper GPUs, on a machine without one.

Triton's compiler runs in a process of its own, because here its interpreter is on.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.kernels
def test_every_kernel_compiles_for_ampere_and_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.step.kernels.compiling"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= 24 and not any("spills" in line for line in lines), done.stdout
    on_hopper = [line for line in lines if line.startswith("_screen_kernel sm_90")]
    assert on_hopper and all("wgmma" in line for line in on_hopper)
