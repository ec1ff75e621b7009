"""What a resumed training needs beside SAELens' checkpoint files, in two files next to them.

SAELens' own hold the parameters as they are used. Here are the parameters as the optimiser sees
them (θ = exp(log θ) and back is not exact to the last bit; a resumed run should be), the bandwidth,
and the state of the L0 controller, of the firing record and of the frequencies' prices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from jumprelu_plugin.control.density import DensityMultipliers
from jumprelu_plugin.control.l0 import L0Controller
from jumprelu_plugin.control.resampling import FiringRecord

STATE_FILENAME = "jumprelu_training_state.json"
TENSORS_FILENAME = "jumprelu_stored_parameters.safetensors"


@dataclass
class Checkpoint:
    """What was read; empty for a stock checkpoint.

    Attributes:
        bandwidth: ε, or None before the first step.
        tensors: stored parameters by name, the firing record's, and the prices.
    """

    bandwidth: float | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    controller: dict[str, Any] | None = None
    firing: dict[str, Any] | None = None

    def restore(
        self,
        controller: L0Controller | None,
        firing: FiringRecord | None,
        prices: DensityMultipliers | None,
    ) -> None:
        """Hand their state back to those that there are."""
        if controller is not None and self.controller is not None:
            controller.load_state(self.controller)
        if firing is not None and self.firing is not None:
            firing.load_state(self.firing, self.tensors)
        if prices is not None:
            prices.load(self.tensors)


def write(
    folder: Path,
    bandwidth: float | None,
    stored: Mapping[str, Tensor],
    controller: L0Controller | None,
    firing: FiringRecord | None,
    prices: DensityMultipliers | None,
) -> None:
    """Add the two files to a checkpoint; the one with tensors only if there are any."""
    tensors = {
        **stored,
        **({} if firing is None else firing.tensors()),
        **({} if prices is None else prices.tensors()),
    }
    if tensors:
        save_file(tensors, folder / TENSORS_FILENAME)
    state = {
        "bandwidth": bandwidth,
        "controller": None if controller is None else controller.state(),
        "firing": None if firing is None else firing.state(),
    }
    (folder / STATE_FILENAME).write_text(json.dumps(state))


def read(folder: Path) -> Checkpoint | None:
    """What `write` left there; None in a stock checkpoint."""
    if not (folder / STATE_FILENAME).exists():
        return None
    tensors = folder / TENSORS_FILENAME
    return Checkpoint(
        **json.loads((folder / STATE_FILENAME).read_text()),
        tensors=load_file(tensors) if tensors.exists() else {},
    )
