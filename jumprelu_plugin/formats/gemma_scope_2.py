"""Gemma Scope 2's format: `params.safetensors` and `config.json`.

The tensors are w_enc [d_in, d_sae], w_dec [d_sae, d_out], b_enc, b_dec, threshold and, for a
transcoder with a skip connection, affine_skip_connection [d_in, d_out] (SAELens' W_skip,
transposed). Hooks have the names of modules of the transformers model.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jumprelu_plugin.formats.checking import Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.saelens import compare_sae
from jumprelu_plugin.formats.saelens_loaders import hub_files_from, load_with
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.saes.parameters import Parameters

FILENAME = "params.safetensors"
CONFIG = "config.json"
LOADER = Loader("SAELens' Gemma Scope 2 loader", "sae_lens", "sae-lens", "pip install sae-lens")

_KEYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
# By TransformerLens' hook inside the block: its place in the transformers model, Gemma 2 and 3.
_PLACES = {
    "hook_resid_post": "output",
    "hook_resid_mid": "pre_feedforward_layernorm.input",
    "mlp.hook_in": "pre_feedforward_layernorm.output",
    "hook_mlp_out": "post_feedforward_layernorm.output",
    "attn.hook_z": "self_attn.o_proj.input",
}
# By hook: the folder name from which SAELens' loader reads the hook.
_FOLDERS = {"hook_resid_post": "resid_post", "hook_mlp_out": "mlp_out", "attn.hook_z": "attn_out"}


def is_format(folder: Path) -> bool:
    """Whether the folder has a params.safetensors."""
    return (folder / FILENAME).is_file()


def read(folder: Path) -> Dictionary:
    """Read a Gemma Scope 2 SAE or transcoder.

    Raises:
        ValueError: the files have wrong keys or shapes, or the config names another architecture.
    """
    path = folder / FILENAME
    config = _config(folder)
    try:
        tensors = {key: value.float() for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    skip = tensors.pop(_SKIP, None)
    if sorted(tensors) != sorted(_KEYS):
        raise ValueError(
            f"{path} holds {sorted(tensors)}; expected {sorted(_KEYS)} and optionally {_SKIP}"
        )
    tensors = {key.replace("w_", "W_"): value for key, value in tensors.items()}
    if skip is not None:
        tensors["W_skip"] = skip.T.contiguous()
    try:
        parameters = Parameters.named(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    hook_in = _hook(config.get("hf_hook_point_in"))
    hook_out = _hook(config.get("hf_hook_point_out")) or hook_in
    return Dictionary(parameters, hook_in, hook_out, config.get("model_name"))


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write params.safetensors and config.json, with b_dec folded into b_enc.

    Raises:
        ValueError: the hook has no name in the transformers model.
    """
    parameters = dictionary.parameters.fold_b_dec()
    tensors = {key: getattr(parameters, key.replace("w_", "W_")) for key in _KEYS}
    if parameters.W_skip is not None:
        tensors[_SKIP] = parameters.W_skip.T
    config = {
        "architecture": "jump_relu",
        "type": "transcoder" if dictionary.is_transcoder else "sae",
        "model_name": dictionary.model_name,
        "hf_hook_point_in": _place(*dictionary.site()),
        "hf_hook_point_out": _place(*dictionary.site_out()),
        "width": parameters.d_sae,
        "affine_connection": dictionary.has_skip,
    }
    _folder_name(dictionary)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / FILENAME)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with the dictionary that SAELens' loader for Gemma Scope 2 reads from the files."""
    from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader

    with hub_files_from(folder):
        sae = load_with(
            gemma_3_sae_huggingface_loader,
            "google/gemma-scope-2-270m-pt",
            _folder_name(dictionary),
            {},
        )
    return compare_sae(dictionary.parameters, sae, str(LOADER))


def fold_gain(dictionary: Dictionary) -> Dictionary:
    """Convert a transcoder of ln2.hook_normalized to one of mlp.hook_in, after the norm's gain.

    Raises:
        ValueError: the hook is another, or the model is not known.
    """
    layer, hook = dictionary.site()
    if hook != "ln2.hook_normalized":
        raise ValueError(f"--fold_gain is for ln2.hook_normalized, not {dictionary.hook_name}")
    if not dictionary.model_name:
        raise ValueError(
            "the gain is a parameter of the model, which is not known: give --model_name"
        )
    model = load_model(dictionary.model_name, "HookedTransformer")
    gain = model.blocks[layer].ln2.w.detach()
    return replace(
        dictionary,
        parameters=dictionary.parameters.fold_input_gain(gain),
        hook_name=f"blocks.{layer}.mlp.hook_in",
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has {FILENAME} and no {CONFIG}, which names its hooks")
    config = json.loads(path.read_text())
    if config.get("architecture") != "jump_relu":
        raise ValueError(
            f"{path} says architecture {config.get('architecture')!r}; expected 'jump_relu'"
        )
    return config


def _place(layer: int, hook: str) -> str:
    if hook == "ln2.hook_normalized":
        raise ValueError(
            "ln2.hook_normalized is before the norm's gain, and no module of the transformers "
            "model gives it. Fold the gain into the encoder with --fold_gain, which gives a "
            "transcoder of pre_feedforward_layernorm.output (mlp.hook_in)"
        )
    if hook not in _PLACES:
        raise ValueError(
            f"Gemma Scope 2 names hooks by modules of the transformers model, and {hook!r} has "
            f"no such name; hooks with one are {', '.join(_PLACES)}"
        )
    return f"model.layers.{layer}.{_PLACES[hook]}"


def _hook(place: str | None) -> str | None:
    match = re.match(r"^model\.layers\.(\d+)\.(.+)$", place or "")
    names = {module: hook for hook, module in _PLACES.items()}
    if match is None or match[2] not in names:
        return None
    return f"blocks.{match[1]}.{names[match[2]]}"


def _folder_name(dictionary: Dictionary) -> str:
    layer, hook = dictionary.site()
    if dictionary.is_transcoder:
        return f"transcoder/layer_{layer}"
    if hook not in _FOLDERS:
        raise ValueError(
            f"Gemma Scope 2 holds SAEs of {', '.join(_FOLDERS)}, not of {dictionary.hook_name}"
        )
    return f"{_FOLDERS[hook]}/layer_{layer}"
