"""lm-eval's format of a steering vector: `steer.pt`, for its `steered` models."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch

from jumprelu_plugin.analysis.steering import steering_vector
from jumprelu_plugin.formats.checking import Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.steering_vectors import (
    compare_steered_logits,
    module_name,
    require_model_folder,
)

FILENAME = "steer.pt"
LOADER = Loader(
    "lm-eval's SteeredModel", "lm_eval", "lm_eval", "pip install --no-deps lm-eval==0.4.13"
)


def write(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> None:
    """Write steer.pt, for `lm_eval --model steered --model_args steer_path=steer.pt,...`.

    Raises:
        ValueError: no module's output is the dictionary's hook, or a latent is out of range.
    """
    entry = {
        "steering_vector": steering_vector(dictionary.as_sae(), amounts),
        "steering_coefficient": 1.0,
        "action": "add",
        "bias": None,
        "head_index": None,
    }
    torch.save({module_name(dictionary): entry}, folder / FILENAME)


def check(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> Check:
    """Compare the logits of lm-eval's steered model with those under `analysis.steering.steer`."""
    torch.load(folder / FILENAME, weights_only=True)  # lm-eval would unpickle any object
    steered = import_module("lm_eval.models.hf_steered").SteeredModel(
        pretrained=str(require_model_folder(dictionary, LOADER)),
        steer_path=str(folder / FILENAME),
        device="cpu",
        dtype="float32",
        attn_implementation="eager",
    )
    return compare_steered_logits(dictionary, amounts, steered._model_call, str(LOADER))
