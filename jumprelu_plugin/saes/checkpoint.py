"""What a resumed training needs beside SAELens' checkpoint files, in two files next to them.

SAELens' own hold the parameters as they are used. Here are the parameters as the optimizer sees
them (θ = exp(log θ) and back is not exact to the last bit; a resumed run should be), the center and
spread of the data, and the state of the dictionary's control.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from jumprelu_plugin.control.dictionary_control import DictionaryControl
from jumprelu_plugin.control.standardization import Standardization

STATE_FILENAME = "jumprelu_training_state.json"
TENSORS_FILENAME = "jumprelu_stored_parameters.safetensors"
_CENTER, _SPREAD = "activation_center", "activation_spread"


def write(
    folder: Path,
    stored: Mapping[str, Tensor],
    control: DictionaryControl,
    standardization: Standardization | None,
) -> None:
    """Add the two files to a checkpoint; the one with tensors only if there are any."""
    tensors, state = {**stored, **control.tensors()}, control.state()
    if standardization is not None:
        tensors[_CENTER] = standardization.center
        state[_SPREAD] = standardization.scale
    if tensors:
        save_file(tensors, folder / TENSORS_FILENAME)
    (folder / STATE_FILENAME).write_text(json.dumps(state))


def read(
    folder: Path, control: DictionaryControl
) -> tuple[dict[str, Tensor], Standardization | None] | None:
    """Restore `control`; return the stored parameters and the standardization. None for a stock
    checkpoint."""
    if not (folder / STATE_FILENAME).exists():
        return None
    path = folder / TENSORS_FILENAME
    tensors = load_file(path) if path.exists() else {}
    state = json.loads((folder / STATE_FILENAME).read_text())
    control.load_state(state, tensors)
    if _SPREAD not in state:
        return tensors, None
    return tensors, Standardization(tensors[_CENTER], state[_SPREAD])
