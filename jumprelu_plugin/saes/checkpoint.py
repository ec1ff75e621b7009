"""What a resumed training needs beside SAELens' checkpoint files, in two files next to them.

SAELens' own hold the parameters as they are used. Here are the parameters as the optimizer sees
them (θ = exp(log θ) and back is not exact to the last bit; a resumed run should be), the center and
spread of the data, and the state of the dictionary's control.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from jumprelu_plugin.control.dictionary_control import DictionaryControl
from jumprelu_plugin.control.standardization import Standardization
from jumprelu_plugin.records import is_number, read_json
from jumprelu_plugin.saes.tensor_files import read_safetensors

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
    checkpoint.

    Raises:
        ValueError: the files are damaged, or of another run.
    """
    if not (folder / STATE_FILENAME).exists():
        return None
    path = folder / TENSORS_FILENAME
    tensors = read_safetensors(path) if path.exists() else {}
    state = read_json(folder / STATE_FILENAME)
    try:
        control.load_state(state, tensors)
        return tensors, _standardization(state, tensors)
    except ValueError as error:
        raise ValueError(
            f"{folder / STATE_FILENAME} and {TENSORS_FILENAME} do not fit this run: {error}. "
            "Resume with the config the run started with, or from an earlier checkpoint"
        ) from error


def _standardization(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Standardization | None:
    if _SPREAD not in state:
        return None
    spread = state[_SPREAD]
    if _CENTER not in tensors or not (is_number(spread) and spread > 0):
        raise ValueError(f"{_SPREAD} is {spread!r}, or there is no {_CENTER}")
    return Standardization(tensors[_CENTER], spread)
