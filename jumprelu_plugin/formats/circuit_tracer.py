"""circuit-tracer's format of a transcoder set, with one transcoder for every layer of a model.

`config.yaml` names the hooks. `layer_{i}.safetensors` holds W_enc [d_sae, d_model] (transposed
against SAELens), W_dec, b_enc, b_dec, `activation_function.threshold` and optionally W_skip.
b_dec is not subtracted from the input. All layers must be there with the same width: if the last is
missing, circuit-tracer runs and gives a graph of the wrong size.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from jumprelu_plugin.formats import saelens
from jumprelu_plugin.formats.checking import Check, Loader, compare_dictionary
from jumprelu_plugin.formats.circuit_tracer_folder import CONFIG, require_readable
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.processing import which_weights
from jumprelu_plugin.formats.reading import layer_folders
from jumprelu_plugin.saes.parameters import Parameters, dead_parameters

LOADER = Loader(
    "load_transcoders_from_cache",
    "circuit_tracer",
    "circuit-tracer",
    "pip install --no-deps circuit-tracer==0.5.0",
)

# The hooks inside a block that circuit-tracer can replace: between them and the residual stream,
# effects are linear once norms and attention patterns are frozen.
INPUTS = ("ln2.hook_normalized", "hook_resid_mid", "mlp.hook_in")
OUTPUTS = ("hook_mlp_out", "mlp.hook_out")


def read_layers(folder: Path, *, fold_scale: bool = False) -> dict[int, Dictionary]:
    """Read the transcoders in `folder/layer_0`, `folder/layer_1`, ..., saved by SAELens.

    Args:
        folder: the folder of the layers' folders.
        fold_scale: fold the input scales of checkpoints into their parameters.

    Returns:
        The transcoders by layer.

    Raises:
        ValueError: there are none, or one reads another layer than that of its folder.
    """
    layers = {
        layer: saelens.read(path, fold_scale=fold_scale)
        for layer, path in layer_folders(folder).items()
    }
    if not layers:
        raise ValueError(
            f"{folder} holds no transcoders: expected SAELens folders layer_0, layer_1, ..., one "
            "for each layer of the model"
        )
    for layer, dictionary in layers.items():
        if dictionary.site()[0] != layer:
            raise ValueError(
                f"{folder / f'layer_{layer}'} reads {dictionary.hook_name}, a hook of another layer"
            )
    return layers


def complete_layers(
    layers: Mapping[int, Dictionary], n_layers: int, *, pad_missing: bool = False
) -> dict[int, Dictionary]:
    """Check the layers, and optionally add dead transcoders for missing ones.

    A dead transcoder never fires and its output is zero, so that layer's MLP becomes error nodes.

    Args:
        layers: transcoders by layer.
        n_layers: number of layers of the model.
        pad_missing: add dead transcoders for missing layers.

    Returns:
        One transcoder for every layer, by layer in ascending order.

    Raises:
        ValueError: a layer is missing or beyond the model, or widths or hooks differ.
    """
    _check_layers(layers)
    beyond = sorted(layer for layer in layers if layer >= n_layers)
    if beyond:
        raise ValueError(f"the model has {n_layers} layers, and there are transcoders of {beyond}")
    missing = [layer for layer in range(n_layers) if layer not in layers]
    if missing and not pad_missing:
        raise ValueError(
            f"layers {missing} of {n_layers} have no transcoder. circuit-tracer needs all layers, "
            "and would give a graph of the wrong size. Train them, or pass --pad_missing to add "
            "transcoders that never fire (their MLPs become error nodes)"
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
    """Write config.yaml and a layer_{i}.safetensors for each layer.

    Args:
        layers: one transcoder for every layer of the model (`complete_layers`).
        folder: the folder to write to.
        model_name: the model, as circuit-tracer names it.
        scan: the name of the set.
    """
    first = layers[0]
    config = {
        "model_kind": "transcoder_set",
        "model_name": model_name,
        "feature_input_hook": first.site()[1],
        "feature_output_hook": first.site_out()[1],
        "scan": scan,
    }
    # circuit-tracer looks for a skip connection only in layer 0, so all layers get one or none.
    skip = any(dictionary.has_skip for dictionary in layers.values())
    for layer, dictionary in layers.items():
        tensors = _tensors(dictionary.parameters.fold_b_dec(), skip)
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def load_transcoders(folder: Path) -> Any:
    """Load a folder with circuit-tracer, on the CPU in float32.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others.
        OSError: a file cannot be opened.
    """
    require_readable(Path(folder))
    make_importable()
    caching = import_module("circuit_tracer.utils.caching")
    transcoders, _ = caching.load_transcoders_from_cache(
        str(Path(folder).resolve()), device=torch.device("cpu"), lazy_decoder=False
    )
    return transcoders


def check(layers: Mapping[int, Dictionary], folder: Path) -> Check:
    """Compare every layer with the transcoder that circuit-tracer loads from the folder."""
    transcoders = load_transcoders(folder)
    if len(transcoders) != len(layers):
        raise ValueError(
            f"circuit-tracer found {len(transcoders)} layers in the export, not {len(layers)}"
        )
    checks = [
        compare_dictionary(
            dictionary.parameters, transcoders[layer].encode, transcoders[layer], str(LOADER)
        )
        for layer, dictionary in layers.items()
    ]
    return Check(
        str(LOADER),
        min(each.inputs for each in checks),
        sum(each.active for each in checks) / len(checks),
        max(each.error for each in checks),
    )


def make_importable() -> None:
    """Add a constant to huggingface_hub that circuit-tracer 0.5.0 imports and version 1 lacks."""
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
        zeros = torch.zeros(parameters.d_out, parameters.d_in)
        tensors["W_skip"] = zeros if parameters.W_skip is None else parameters.W_skip
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def require_one_model(layers: Mapping[int, Dictionary]) -> None:
    """Raise ValueError for layers that were trained on different models, as far as they say it."""
    models = {
        layer: " ".join([each.model_name, *map(str, which_weights(each.metadata).values())])
        for layer, each in layers.items()
        if each.model_name
    }
    _check_equal(models, "models")


def _check_layers(layers: Mapping[int, Dictionary]) -> None:
    for layer, dictionary in layers.items():
        _check_hooks(layer, dictionary)
    _check_equal({k: d.parameters.d_sae for k, d in layers.items()}, "widths (d_sae)")
    _check_equal({k: (d.site()[1], d.site_out()[1]) for k, d in layers.items()}, "hooks")
    _check_equal({k: d.parameters.d_in for k, d in layers.items()}, "input widths (d_in)")


def _check_hooks(layer: int, dictionary: Dictionary) -> None:
    (layer_in, hook_in), (layer_out, hook_out) = dictionary.site(), dictionary.site_out()
    if hook_in not in INPUTS or hook_out not in OUTPUTS or layer_in != layer_out:
        raise ValueError(
            f"layer {layer}: circuit-tracer replaces MLPs by transcoders that read "
            f"{', '.join(INPUTS)} and write {' or '.join(OUTPUTS)} of the same layer; this one "
            f"reads {dictionary.hook_name} and writes "
            f"{dictionary.hook_name_out or dictionary.hook_name}"
        )
    parameters = dictionary.parameters
    if parameters.d_in != parameters.d_out:
        raise ValueError(
            f"layer {layer}: circuit-tracer's transcoders read and write the residual stream's "
            f"width; this one reads width {parameters.d_in} and writes width {parameters.d_out}"
        )


def _check_equal(by_layer: Mapping[int, object], name: str) -> None:
    if len(set(by_layer.values())) > 1:
        listed = ", ".join(f"layer {layer}: {value}" for layer, value in by_layer.items())
        raise ValueError(
            f"the layers have different {name} ({listed}), and circuit-tracer requires the same: "
            "retrain those that differ, or leave them out and pass --pad_missing"
        )
