"""What a checkpoint holds of the training of a cross-layer transcoder, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from jumprelu_plugin.records import read_json, write_json
from jumprelu_plugin.saes.tensor_files import explained, read_safetensors, read_torch

_VALUES, _TENSORS, _OPTIMIZER = "training_state.json", "training_state.safetensors", "optimizer.pt"


@dataclass(frozen=True)
class SavedTraining:
    """The state of a training, beside its place in the text.

    Attributes:
        tensors: the weights, as `model.…`, and what the controls keep of each latent.
        optimizer, scheduler: their `state_dict`.
        values: numbers, in JSON's types.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    values: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint."""
        contiguous = {name: value.contiguous() for name, value in self.tensors.items()}
        save_file(contiguous, folder / _TENSORS)
        moving = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        torch.save(moving, folder / _OPTIMIZER)
        write_json(folder / _VALUES, self.values)

    @classmethod
    def read(cls, folder: Path, device: str) -> SavedTraining:
        """Read what `write` wrote; the weights on this device.

        Raises:
            ValueError: a file is damaged.
            OSError: one is missing.
        """
        tensors = read_safetensors(folder / _TENSORS, device)
        moving = read_torch(folder / _OPTIMIZER)
        if not isinstance(moving, Mapping):
            raise ValueError(f"{folder / _OPTIMIZER} holds no optimizer's state")
        values = read_json(folder / _VALUES)
        with explained(folder, "resume from an earlier one, or start anew"):
            return cls(tensors, moving["optimizer"], moving["scheduler"], values)
