"""A finished cross-layer transcoder on disk: `cross_layer.json` and a `layer_{i}.safetensors` each.

A layer's file holds W_enc [d_in, d_sae], b_enc, threshold, W_dec [d_sae, later, d_out] and b_dec;
what it computes is on the model's own activations. It is this package's own format: SAELens has no
class for it. `jumprelu export --to circuit-tracer` writes the one that circuit-tracer reads.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jumprelu_plugin.records import whole_files, write_json
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder, SourceLayer

CONFIG = "cross_layer.json"
ARCHITECTURE = "jumprelu_cross_layer_transcoder"


def is_here(folder: str | Path) -> bool:
    """Whether a folder says that it holds a cross-layer transcoder."""
    return Path(folder, CONFIG).is_file()


def save_clt(model: CrossLayerTranscoder, folder: str | Path) -> Path:
    """Write the folder; the scales must be folded (`fold_scales_`). Returns `folder`.

    Raises:
        ValueError: parameters that are not finite, or negative thresholds.
    """
    with whole_files(folder, last=CONFIG) as unfinished:
        for layer, source in zip(model.cfg.layers, model.sources, strict=True):
            source.parameters_to_all()
            save_file(_tensors(source), unfinished / f"layer_{layer}.safetensors")
        write_json(unfinished / CONFIG, {"architecture": ARCHITECTURE, **asdict(model.cfg)})
    return Path(folder)


@torch.no_grad()
def load_clt(folder: str | Path, device: str = "cpu") -> CrossLayerTranscoder:
    """Read a folder that `save_clt` wrote.

    Raises:
        ValueError: the folder holds none, a file is missing, or one has wrong keys, shapes or
            values.
    """
    folder = Path(folder)
    if not is_here(folder):
        raise ValueError(
            f"{folder} holds no cross-layer transcoder: there is no {CONFIG} in it. "
            "`jumprelu train-clt` writes one"
        )
    model = CrossLayerTranscoder(read_config(folder))
    for layer, source in zip(model.cfg.layers, model.sources, strict=True):
        path = folder / f"layer_{layer}.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{path.name} is missing in {folder}, which should hold layers "
                f"{model.cfg.layers[0]} to {model.cfg.layers[-1]}: copy the whole folder"
            )
        _fill(source, path)
        try:
            source.parameters_to_all()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return model.to(device).eval()


def read_config(folder: str | Path) -> CLTConfig:
    """What the folder says of its transcoder.

    Raises:
        ValueError: it cannot be read, or is of something else.
    """
    path = Path(folder, CONFIG)
    try:
        fields = json.loads(path.read_text())
        architecture = fields.pop("architecture")
        if architecture != ARCHITECTURE:
            raise ValueError(f"its architecture is {architecture!r}, expected {ARCHITECTURE!r}")
        return CLTConfig(**{**fields, "layers": tuple(fields["layers"])})
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _tensors(source: SourceLayer) -> dict[str, Tensor]:
    tensors = {name: value.detach().cpu() for name, value in source.named_parameters()}
    tensors["W_dec"] = tensors["W_dec"].unflatten(1, (source.later, source.d_out))
    return {name: value.contiguous() for name, value in tensors.items()}


def _fill(source: SourceLayer, path: Path) -> None:
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    expected = {name: tuple(value.shape) for name, value in _tensors(source).items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != expected:
        odd = sorted(
            name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name)
        )
        listed = ", ".join(
            f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in odd
        )
        raise ValueError(f"{path} does not fit {CONFIG}: {listed}")
    found["W_dec"] = found["W_dec"].flatten(1)
    for name, parameter in source.named_parameters():
        parameter.data.copy_(found[name])
