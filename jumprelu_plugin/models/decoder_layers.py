"""The path of a transformers model's layers, such as `model.layers` or `transformer.h`.

It is found among the modules of the model, built from its config without weights. If the config of
a hub name is not on this machine, the path is that of the model's family, recognized by the name.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from jumprelu_plugin.models.language_models import local_folder

# By a pattern of the family's hub names: the base model's name in the whole model, and the path of
# the layers in the base model. Gemma 3 from 4b on has an image encoder and other paths.
_FAMILIES = {
    r"gemma-(2b|7b|2-\d+b|3-(270m|1b))(-|$)": ("model", "layers"),
    r"((meta-)?llama-[23]|mistral-7b|qwen[23](\.\d+)?-\d)(?!.*(vision|vl))": ("model", "layers"),
    r"(gpt2|distilgpt2)": ("transformer", "h"),
    r"(pythia|gpt-neox)": ("gpt_neox", "layers"),
}


@dataclass(frozen=True)
class DecoderLayers:
    """The place of a model's layers.

    Attributes:
        base: the base model's name in the whole model, such as `transformer`.
        layers: the path of the list of layers in the base model, such as `h`.
        model_type: the config's model type; None if there was no config.
    """

    base: str
    layers: str
    model_type: str | None = None


@cache
def decoder_layers(model_name: str) -> DecoderLayers:
    """The place of the layers of the model called `model_name`. Nothing is downloaded.

    Args:
        model_name: as for `load_model`.

    Raises:
        ValueError: there is no config, and the family of the name is not known.
        FileNotFoundError: the name is a path that does not exist.
    """
    config = _config(model_name)
    if config is not None:
        return _read(config, model_name)
    last = model_name.rsplit("/", 1)[-1].lower()
    for pattern, (base, layers) in _FAMILIES.items():
        if re.match(pattern, last):
            return DecoderLayers(base, layers)
    raise ValueError(
        f"the config of {model_name!r} is not on this machine, and the family of this name is not "
        "known, so the module of its layers is unknown: give the folder of the model (its "
        "config.json is enough) as the model's name"
    )


def _config(model_name: str) -> Any | None:
    from transformer_lens.loading_from_pretrained import get_official_model_name
    from transformers import AutoConfig

    folder = local_folder(model_name)
    if folder is None:
        with suppress(ValueError):  # TransformerLens does not know every hub name
            model_name = get_official_model_name(model_name)
    try:
        return AutoConfig.from_pretrained(folder or model_name, local_files_only=True)
    except (OSError, ValueError):
        return None


def _read(config: Any, model_name: str) -> DecoderLayers:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = config.get_text_config().num_hidden_layers
    base = model.base_model
    lists = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ValueError(f"{model_name!r} has no list of {count} layers among its modules")
    whole = next(name for name, module in model.named_modules() if module is base)
    return DecoderLayers(whole, min(lists, key=lambda name: name.count(".")), config.model_type)
