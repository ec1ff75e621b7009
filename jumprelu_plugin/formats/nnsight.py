"""A steering vector for nnsight, which has no format of its own.

`steer.safetensors` holds the vector, and `steer.json` names the module it is added to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from jumprelu_plugin.analysis.steering import steering_vector
from jumprelu_plugin.formats.checking import Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.steering_vectors import (
    compare_steered_logits,
    module_name,
    require_model_folder,
)
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.records import read_json
from jumprelu_plugin.saes.tensor_files import read_safetensors

VECTOR_FILENAME = "steer.safetensors"
SETTINGS_FILENAME = "steer.json"
LOADER = Loader("nnsight's LanguageModel", "nnsight", "nnsight", "pip install nnsight==0.8.1")


def write(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> None:
    """Write steer.safetensors and steer.json, whose module's path starts at the whole model.

    Raises:
        ValueError: no module's output is the dictionary's hook, or a latent is out of range.
    """
    vector = steering_vector(dictionary.as_sae(), amounts)
    save_file({"steering_vector": vector.contiguous()}, folder / VECTOR_FILENAME)
    settings = {
        "module": module_name(dictionary, in_base_model=False),
        "model_name": dictionary.model_name,
        "hook_name": dictionary.hook_name_out or dictionary.hook_name,
        "latents": {str(latent): amount for latent, amount in amounts.items()},
        "action": "add",
    }
    (folder / SETTINGS_FILENAME).write_text(json.dumps(settings, indent=2) + "\n")


def check(dictionary: Dictionary, folder: Path, amounts: Mapping[int, float]) -> Check:
    """Compare the logits in an nnsight trace with those under `analysis.steering.steer`."""
    model_folder = require_model_folder(dictionary, LOADER)
    steered = steered_logits(folder, model_folder)
    return compare_steered_logits(dictionary, amounts, steered, str(LOADER))


def steered_logits(folder: Path, model_folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from tokens to the logits of an nnsight model with the vector in `folder`."""
    plain = load_model(model_folder, "AutoModelForCausalLM")
    model = import_module("nnsight").LanguageModel(plain, tokenizer=plain.tokenizer)
    settings = read_json(folder / SETTINGS_FILENAME)
    vector = read_safetensors(folder / VECTOR_FILENAME)["steering_vector"]
    module: Any = model
    for part in settings["module"].split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)

    def run(tokens: Tensor) -> Tensor:
        with torch.no_grad(), model.trace(tokens):
            module.output = add_vector(module.output, vector)
            logits = model.output.logits.save()
        return logits

    return run


def add_vector(output: Any, vector: Tensor) -> Any:
    """A layer's output with `vector` added to the hidden states, which may be in a tuple."""
    if isinstance(output, tuple):
        return (output[0] + vector, *output[1:])
    return output + vector
