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

import torch
from safetensors.torch import save_file

from jumprelu_plugin.formats.checking import Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.processing import which_weights
from jumprelu_plugin.formats.saelens import compare_sae
from jumprelu_plugin.formats.saelens_loaders import hub_files_from, load_with
from jumprelu_plugin.models.decoder_layers import decoder_layers
from jumprelu_plugin.models.language_models import load_model, local_folder
from jumprelu_plugin.records import named, read_json, text_field
from jumprelu_plugin.saes.parameters import Parameters
from jumprelu_plugin.saes.tensor_files import read_safetensors

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
# By the kind in the folder's name: the places it reads and writes, as SAELens' loader infers them.
_KINDS = {
    "transcoder": (_PLACES["mlp.hook_in"], _PLACES["hook_mlp_out"]),
    "clt": (_PLACES["mlp.hook_in"], _PLACES["hook_mlp_out"]),
    "resid_post": (_PLACES["hook_resid_post"], None),
    "attn_out": (_PLACES["attn.hook_z"], None),
    "mlp_out": (_PLACES["hook_mlp_out"], None),
}


def is_format(folder: Path) -> bool:
    """Whether the folder has a params.safetensors."""
    return (folder / FILENAME).is_file()


def read(
    folder: Path, *, hook_name: str | None = None, hook_name_out: str | None = None
) -> Dictionary:
    """Read a Gemma Scope 2 SAE or transcoder.

    Without a config.json, hooks and model are those of the folder's name in the release, such as
    `gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_small`, as in SAELens' loader.

    Args:
        folder: the folder of params.safetensors.
        hook_name, hook_name_out: override what the config names.

    Raises:
        ValueError: the files have wrong keys or shapes, the config names another architecture or a
            place in the model that has no hook, or there is no config and the folder's name does
            not tell the hooks.
    """
    path = folder / FILENAME
    config = _config(folder) if hook_name is None or (folder / CONFIG).is_file() else {}
    tensors = {key: value.float() for key, value in read_safetensors(path).items()}
    skip = tensors.pop(_SKIP, None)
    if sorted(tensors) != sorted(_KEYS):
        raise ValueError(
            f"{path} holds {sorted(tensors)}; expected {sorted(_KEYS)} and optionally {_SKIP}"
        )
    tensors = {key.replace("w_", "W_"): value for key, value in tensors.items()}
    if skip is not None:
        tensors["W_skip"] = skip.T.contiguous()
    with named(path):
        parameters = Parameters.named(tensors)
    hooks = []
    for given, field, flag in (
        (hook_name, "hf_hook_point_in", "--hook_name"),
        (hook_name_out, "hf_hook_point_out", "--hook_name_out"),
    ):
        text_field(config, field, folder / CONFIG)
        with named(folder):
            hooks.append(given or _hook(config, field, flag))
    model_name = _model_name(text_field(config, "model_name", folder / CONFIG))
    return Dictionary(parameters, hooks[0], hooks[1] or hooks[0], model_name)


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write params.safetensors and config.json, with b_dec folded into b_enc.

    Raises:
        ValueError: the hook has no name in the transformers model, or the model has no such module.
    """
    _require_modules(dictionary)
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
        ValueError: the hook is another, the model is not known, or its norm centers.
        OSError: the model cannot be had.
    """
    layer, hook = dictionary.site()
    if hook != "ln2.hook_normalized":
        raise ValueError(f"--fold_gain is for ln2.hook_normalized, not {dictionary.hook_name}")
    if not dictionary.model_name:
        raise ValueError(
            "the gain is a parameter of the model, which is not known: give --model_name"
        )
    in_folder = local_folder(dictionary.model_name) is not None  # which holds one model's weights
    weights = {} if in_folder else which_weights(dictionary.metadata)
    model = load_model(dictionary.model_name, _model_class(dictionary), **weights)
    with torch.no_grad():  # the norm is called, because models differ in how they store its gain
        same = torch.full((1, 1, model.cfg.d_model), 100.0)
        gain, opposite = (model.blocks[layer].ln2(x).flatten() for x in (same, -same))
    # A norm that subtracts the mean gives its bias for either, or 0.
    if not gain.any() or not torch.equal(gain, -opposite):
        raise ValueError(
            f"the norm of {dictionary.model_name!r} subtracts the mean or adds a bias, which a "
            "transcoder of Gemma Scope 2 cannot: --fold_gain is for models such as Gemma"
        )
    return replace(
        dictionary,
        parameters=dictionary.parameters.fold_input_gain(gain),
        hook_name=f"blocks.{layer}.mlp.hook_in",
    )


def _model_class(dictionary: Dictionary) -> str:
    """The recorded class; else the one that takes the model: a bridge takes any folder."""
    recorded = dictionary.metadata.get("model_class_name") or ""
    if recorded.endswith("TransformerBridge"):
        return recorded
    folder = local_folder(dictionary.model_name or "")
    plain = {} if folder is None else read_json(folder / CONFIG)
    if plain.get("model_type", "gemma2") == "gemma2":
        return "HookedTransformer"
    return "TransformerBridge"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return _config_of_name(folder)
    config = read_json(path)
    if config.get("architecture") != "jump_relu":
        raise ValueError(
            f"{path} says architecture {config.get('architecture')!r}; expected 'jump_relu'"
        )
    return config


def _config_of_name(folder: Path) -> dict[str, Any]:
    """What the config of a release's folder would say, by the folder's place in the release."""
    name = "/".join(folder.resolve().parts[-2:])
    layer = re.search(r"layer_(\d+)", name)
    kind = next((kind for kind in _KINDS if kind in name), None)
    if layer is None or kind is None:
        raise ValueError(
            f"{folder} has {FILENAME} and no {CONFIG}, which names its hooks, and the folder's name"
            " does not tell them: keep the names of the release's folders, such as "
            f"resid_post/layer_7_width_16k_l0_small ({', '.join(_KINDS)}), or give --hook_name"
        )
    place_in, place_out = _KINDS[kind]
    release = re.search(r"gemma-scope-2-([a-z0-9]+-(?:pt|it))", str(folder.resolve()))
    return {
        "model_name": release and f"gemma-3-{release[1]}",
        "hf_hook_point_in": f"model.layers.{layer[1]}.{place_in}",
        "hf_hook_point_out": place_out and f"model.layers.{layer[1]}.{place_out}",
    }


def _model_name(name: str | None) -> str | None:
    """The hub name of a Gemma 3 as a release's config writes it; other names as they are."""
    match = re.fullmatch(r"(?:google/)?gemma-v?3-([a-z0-9]+)(-pt|-it)?", name or "")
    if match is None:
        return name
    # The hub has the pretrained 270m without the suffix.
    suffix = "" if match[1] == "270m" and match[2] == "-pt" else match[2] or ""
    return f"google/gemma-3-{match[1]}{suffix}"


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


def _require_modules(dictionary: Dictionary) -> None:
    """Raise ValueError where the model, as far as it is known, lacks the modules that are named."""
    name = dictionary.model_name
    hooks = [dictionary.site()[1], dictionary.site_out()[1]]
    if not name or all(hook == "hook_resid_post" for hook in hooks):
        return
    try:
        family = decoder_layers(name).model_type
    except (OSError, ValueError):  # of a hub name that is not known here
        return
    if family is not None and not family.startswith("gemma"):
        raise ValueError(
            f"Gemma Scope 2 names {' and '.join(dict.fromkeys(hooks))} by Gemma's modules, and "
            f"{name!r} is a {family}: only hook_resid_post can be exported"
        )


def _hook(config: dict[str, Any], field: str, flag: str) -> str | None:
    place = config.get(field)
    if place is None:
        return None
    match = re.match(r"^model\.(?:language_model\.)?layers\.(\d+)\.(.+)$", str(place))
    names = {module: hook for hook, module in _PLACES.items()}
    if match is None or match[2] not in names:
        raise ValueError(
            f"{CONFIG} names the place {place!r} as {field}, and no hook is known for it; known "
            f"are {', '.join(names)} of model.layers.<layer>. Name the hook with {flag}"
        )
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
