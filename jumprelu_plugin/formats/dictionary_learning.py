"""dictionary_learning's format: `ae.pt` and `config.json`.

Its JumpReluAutoEncoder does not subtract b_dec from the input. A file in which b_dec is not folded
into b_enc would load without an error and give wrong activations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from jumprelu_plugin.formats.checking import Check, Loader, compare_dictionary
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.records import named, read_json, text_field
from jumprelu_plugin.saes.parameters import Parameters
from jumprelu_plugin.saes.tensor_files import read_torch

FILENAME = "ae.pt"
CONFIG = "config.json"
LOADER = Loader(
    "load_dictionary",
    "dictionary_learning",
    "dictionary-learning",
    "pip install nnsight zstandard && pip install --no-deps dictionary-learning==0.1.0",
)

_KEYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_CLASS = "JumpReluAutoEncoder"
# By hook: dictionary_learning's name of the submodule.
_SUBMODULES = {
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
}


def is_format(folder: Path) -> bool:
    """Whether the folder has an ae.pt."""
    return (folder / FILENAME).is_file()


def read(folder: Path, *, hook_name: str | None = None) -> Dictionary:
    """Read a JumpReLU autoencoder. Only tensors are unpickled.

    Args:
        folder: the folder of ae.pt and config.json.
        hook_name: overrides the hook that config.json names.

    Raises:
        ValueError: the class is another, the file holds objects other than tensors, or keys,
            shapes or the context's length are wrong.
    """
    path = folder / FILENAME
    trainer, metadata = _trainer(folder), _metadata(folder)
    tensors = read_torch(path)
    if not isinstance(tensors, Mapping) or set(tensors) != set(_KEYS):
        held = sorted(map(str, tensors)) if isinstance(tensors, Mapping) else type(tensors).__name__
        raise ValueError(f"{path} holds {held}; expected {sorted(_KEYS)}")
    other = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise ValueError(f"{path} holds no tensor under {', '.join(other)}")
    with named(path):
        parameters = Parameters.named({key: value.float() for key, value in tensors.items()})
    model_name = text_field(trainer, "lm_name", folder / CONFIG)
    return Dictionary(parameters, hook_name or _hook(trainer), None, model_name, metadata)


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write ae.pt and config.json, with b_dec folded into b_enc.

    Raises:
        ValueError: the dictionary is a transcoder, for which there is no class, or the hook has no
            name in this format.
    """
    if dictionary.is_transcoder:
        raise ValueError(
            "dictionary_learning has no JumpReLU transcoder: its autoencoders read and write the "
            "same activation. Export to saelens, circuit-tracer or gemma-scope-2 instead"
        )
    layer, hook = dictionary.site()
    if hook not in _SUBMODULES:
        raise ValueError(
            f"dictionary_learning has names for {', '.join(_SUBMODULES)}, not {hook!r}"
        )
    parameters = dictionary.parameters.fold_b_dec()
    torch.save({key: parameters.tensors()[key] for key in _KEYS}, folder / FILENAME)
    config = {
        "trainer": {
            "trainer_class": "JumpReluTrainer",
            "dict_class": _CLASS,
            "activation_dim": parameters.d_in,
            "dict_size": parameters.d_sae,
            "layer": layer,
            "lm_name": dictionary.model_name,
            "submodule_name": f"{_SUBMODULES[hook]}_layer_{layer}",
        },
        "buffer": {
            "ctx_len": dictionary.metadata.get("context_size"),
            "d_submodule": parameters.d_in,
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with the autoencoder that dictionary_learning's `load_dictionary` reads."""
    load_dictionary = import_module("dictionary_learning.utils").load_dictionary
    autoencoder, _ = load_dictionary(str(folder), device="cpu")
    return compare_dictionary(dictionary.parameters, autoencoder.encode, autoencoder, str(LOADER))


def _trainer(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has {FILENAME} and no {CONFIG}, which names its class")
    trainer = read_json(path).get("trainer", {})
    if not isinstance(trainer, dict):
        raise ValueError(f"{path} has trainer {trainer!r}; expected an object with a dict_class")
    if trainer.get("dict_class") != _CLASS:
        raise ValueError(
            f"{path} has dict_class {trainer.get('dict_class')!r}; expected {_CLASS!r}, because "
            "only JumpReLU dictionaries are read"
        )
    return trainer


def _metadata(folder: Path) -> dict[str, Any]:
    """SAELens' metadata that config.json has: the length of the sequences in training."""
    path = folder / CONFIG
    buffer = read_json(path).get("buffer") or {}
    length = buffer.get("ctx_len") if isinstance(buffer, dict) else buffer
    if length is None:
        return {}
    if type(length) is not int or length < 1:
        raise ValueError(
            f"{path} has buffer {buffer!r}; expected an object whose ctx_len is a whole number "
            "from 1 on"
        )
    return {"context_size": length}


def _hook(trainer: dict[str, Any]) -> str | None:
    names = {submodule: hook for hook, submodule in _SUBMODULES.items()}
    hook = names.get(str(trainer.get("submodule_name")).split("_layer_")[0])
    layer = trainer.get("layer")
    return None if hook is None or type(layer) is not int else f"blocks.{layer}.{hook}"
