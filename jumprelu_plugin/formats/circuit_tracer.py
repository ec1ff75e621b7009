"""circuit-tracer's folder: one transcoder for every layer of a model.

`config.yaml` names the hooks; `layer_{i}.safetensors` holds W_enc [d_sae, d_model] (transposed
against SAELens), W_dec, b_enc, b_dec, `activation_function.threshold` and perhaps W_skip
[d_out, d_in]. Every layer must be there, all of one width: with one missing at the end,
circuit-tracer runs and gives a graph of the wrong size. It writes b_dec and does not subtract it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from jumprelu_plugin.formats import saelens
from jumprelu_plugin.formats.checking import Check, Loader, compare
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.saes.parameters import Parameters, dead_parameters

CONFIG = "config.yaml"
LOADER = Loader(
    "load_transcoders_from_cache",
    "circuit_tracer",
    "circuit-tracer",
    "pip install --no-deps circuit-tracer==0.5.0",
)

# What circuit-tracer can read and write: places in one block on whose path to and from the residual
# stream gradients are linear once norms and attention patterns are frozen.
INPUTS = ("ln2.hook_normalized", "hook_resid_mid", "mlp.hook_in")
OUTPUTS = ("hook_mlp_out", "mlp.hook_out")
_LAYER_FOLDER = re.compile(r"^layer_(\d+)$")


def read_layers(folder: Path, *, fold_scale: bool = False) -> dict[int, Dictionary]:
    """The transcoders in `folder/layer_0`, `folder/layer_1`, ..., as SAELens saves them.

    Raises:
        ValueError: there are none, or one's hook is of another layer than its folder.
    """
    found: dict[int, Dictionary] = {}
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LAYER_FOLDER.match(child.name)
        if match and saelens.is_here(child):
            found[int(match[1])] = saelens.read(child, fold_scale=fold_scale)
    if not found:
        raise ValueError(
            f"{folder} holds no transcoders: expected folders layer_0, layer_1, ... as SAELens "
            "saves them, one for each layer of the model"
        )
    for layer, dictionary in found.items():
        if dictionary.site()[0] != layer:
            raise ValueError(
                f"{folder / f'layer_{layer}'} reads {dictionary.hook_name}, which is of another "
                "layer than its folder"
            )
    return found


def complete(
    layers: Mapping[int, Dictionary], n_layers: int, *, pad_missing: bool = False
) -> dict[int, Dictionary]:
    """One transcoder for every layer, with dead ones for the missing where asked.

    A dead transcoder never fires and writes zero: that layer's MLP becomes error nodes.

    Raises:
        ValueError: a layer is missing or beyond the model, or the layers do not fit together.
    """
    _check_fit(layers)
    beyond = sorted(layer for layer in layers if layer >= n_layers)
    if beyond:
        raise ValueError(f"the model has {n_layers} layers, and there are transcoders of {beyond}")
    missing = [layer for layer in range(n_layers) if layer not in layers]
    if missing and not pad_missing:
        raise ValueError(
            f"layers {missing} of {n_layers} have no transcoder, and circuit-tracer needs every "
            "layer: it would run and give a graph of the wrong size. Train them, or pass "
            "--pad_missing to put transcoders there that never fire (their MLPs become error "
            "nodes)"
        )
    first = next(iter(layers.values()))
    shape = first.parameters
    skip = any(dictionary.has_skip for dictionary in layers.values())
    dead = dead_parameters(shape.d_in, shape.d_sae, shape.d_out, skip=skip)
    hook, hook_out = first.site()[1], first.site_out()[1]
    padding = {
        layer: Dictionary(dead, f"blocks.{layer}.{hook}", f"blocks.{layer}.{hook_out}")
        for layer in missing
    }
    return dict(sorted({**layers, **padding}.items()))


def write(layers: Mapping[int, Dictionary], folder: Path, *, model_name: str, scan: str) -> None:
    """config.yaml and one layer_{i}.safetensors for each of `layers`, which `complete` gave."""
    first = layers[0]
    config = {
        "model_kind": "transcoder_set",
        "model_name": model_name,
        "feature_input_hook": first.site()[1],
        "feature_output_hook": first.site_out()[1],
        "scan": scan,
    }
    # circuit-tracer takes layer 0 for all in saying whether there are skip connections.
    skip = any(dictionary.has_skip for dictionary in layers.values())
    for layer, dictionary in layers.items():
        tensors = _tensors(dictionary.parameters.fold_b_dec(), skip)
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def load(folder: Path) -> Any:
    """The `TranscoderSet` that circuit-tracer makes of a folder, on the CPU in float32."""
    allow_import()
    caching = import_module("circuit_tracer.utils.caching")
    transcoders, _ = caching.load_transcoders_from_cache(
        str(Path(folder).resolve()), device=torch.device("cpu"), lazy_decoder=False
    )
    return transcoders


def check(layers: Mapping[int, Dictionary], folder: Path) -> Check:
    """Compare every layer with what circuit-tracer makes of the folder."""
    transcoders = load(folder)
    if len(transcoders) != len(layers):
        raise ValueError(
            f"circuit-tracer found {len(transcoders)} layers in what was written, not {len(layers)}"
        )
    checks = [
        compare(dictionary.parameters, transcoders[layer].encode, transcoders[layer], str(LOADER))
        for layer, dictionary in layers.items()
    ]
    return Check(
        str(LOADER),
        min(each.inputs for each in checks),
        sum(each.active for each in checks) / len(checks),
        max(each.error for each in checks),
    )


def allow_import() -> None:
    """Let circuit-tracer 0.5.0 be imported: it reads a name that huggingface_hub 1 dropped."""
    import huggingface_hub.constants as constants

    if not hasattr(constants, "HF_HUB_ENABLE_HF_TRANSFER"):
        constants.HF_HUB_ENABLE_HF_TRANSFER = False  # pyright: ignore[reportAttributeAccessIssue]


def _tensors(parameters: Parameters, skip: bool) -> dict[str, torch.Tensor]:
    tensors = {
        "W_enc": parameters.W_enc.T.contiguous(),
        "W_dec": parameters.W_dec,
        "b_enc": parameters.b_enc,
        "b_dec": parameters.b_dec,
        "activation_function.threshold": parameters.threshold,
    }
    if skip:
        none = torch.zeros(parameters.d_out, parameters.d_in)
        tensors["W_skip"] = none if parameters.W_skip is None else parameters.W_skip
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check_fit(layers: Mapping[int, Dictionary]) -> None:
    for layer, dictionary in layers.items():
        _check_hooks(layer, dictionary)
    _one_value({k: d.parameters.d_sae for k, d in layers.items()}, "widths (d_sae)")
    _one_value({k: (d.site()[1], d.site_out()[1]) for k, d in layers.items()}, "hooks")
    _one_value({k: d.parameters.d_in for k, d in layers.items()}, "input widths (d_in)")


def _check_hooks(layer: int, dictionary: Dictionary) -> None:
    (layer_in, hook_in), (layer_out, hook_out) = dictionary.site(), dictionary.site_out()
    if hook_in not in INPUTS or hook_out not in OUTPUTS or layer_in != layer_out:
        raise ValueError(
            f"layer {layer}: circuit-tracer replaces MLPs, with transcoders that read "
            f"{', '.join(INPUTS)} and write {' or '.join(OUTPUTS)} of one layer; this one reads "
            f"{dictionary.hook_name} and writes {dictionary.hook_name_out or dictionary.hook_name}"
        )
    parameters = dictionary.parameters
    if parameters.d_in != parameters.d_out:
        raise ValueError(
            f"layer {layer}: circuit-tracer's transcoders read and write the residual stream's "
            f"width; this one reads {parameters.d_in} and writes {parameters.d_out}"
        )


def _one_value(by_layer: Mapping[int, object], what: str) -> None:
    if len(set(by_layer.values())) > 1:
        listed = ", ".join(f"layer {layer}: {value}" for layer, value in by_layer.items())
        raise ValueError(
            f"the layers have different {what} ({listed}); circuit-tracer takes one for all: "
            "retrain the odd ones, or leave them out and pass --pad_missing"
        )
