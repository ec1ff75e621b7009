"""A finished cross-layer transcoder on disk: `cross_layer.json` and a `layer_{i}.safetensors` each.

A layer's file holds W_enc [d_in, d_sae], b_enc, threshold, W_dec [d_sae, later, d_out] and b_dec;
what it computes is on the model's own activations. It is this package's own format: SAELens has no
class for it. `jumprelu export --to circuit-tracer` writes the one that circuit-tracer reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from jumprelu_plugin.records import read_json, whole_files, write_json
from jumprelu_plugin.saes.tensor_files import read_safetensors, safetensors_shapes
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
    return save_layers(model.cfg, model.sources, folder)


def save_layers(cfg: CLTConfig, sources: Iterable[SourceLayer], folder: str | Path) -> Path:
    """`save_clt` of layers that come one after the other, so that not all have to be there.

    Raises as `save_clt` does.
    """
    with whole_files(folder, last=CONFIG) as unfinished:
        for layer, source in zip(cfg.layers, sources, strict=True):
            source.parameters_to_all()
            save_file(_tensors(source), unfinished / f"layer_{layer}.safetensors")
        write_json(unfinished / CONFIG, {"architecture": ARCHITECTURE, **asdict(cfg)})
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
    cfg = read_config(folder)
    paths = [folder / f"layer_{layer}.safetensors" for layer in cfg.layers]
    for index, path in enumerate(paths):
        if not path.is_file():
            raise ValueError(
                f"{path.name} is missing in {folder}, which should hold layers "
                f"{cfg.layers[0]} to {cfg.layers[-1]}: copy the whole folder"
            )
        # Before anything of the size that the config names is made.
        _refuse_other_shapes(path, _shapes(cfg, index))
    model = CrossLayerTranscoder(cfg)
    for path, source in zip(paths, model.sources, strict=True):
        found = read_safetensors(path)
        found["W_dec"] = found["W_dec"].flatten(1)
        for name, parameter in source.named_parameters():
            parameter.data.copy_(found[name])
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
    given = read_json(path)
    if given.get("architecture") != ARCHITECTURE:
        raise ValueError(
            f"{path} cannot be read: its architecture is {given.get('architecture')!r}, expected "
            f"{ARCHITECTURE!r}"
        )
    try:
        return CLTConfig(**_fields(given))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Copy the whole folder again") from error


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields, each of its type."""
    read = {name: value for name, value in given.items() if name != "architecture"}
    unknown = sorted(read.keys() - {field.name for field in fields(CLTConfig)})
    if unknown:
        raise ValueError(f"it has the unknown {', '.join(unknown)}")
    for name in ("d_in", "d_out", "d_sae"):
        if type(read.get(name)) is not int:
            raise ValueError(f"{name} is {read.get(name)!r}; expected a whole number")
    layers = read.get("layers")
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise ValueError(f"layers is {layers!r}; expected a list of whole numbers")
    defaults = vars(CLTConfig(d_in=1, d_out=1, d_sae=1, layers=(0,)))
    for name in read.keys() - {"d_in", "d_out", "d_sae", "layers"}:
        value, plain = read[name], defaults[name]
        kinds = (int, type(None)) if plain is None else (type(plain),)
        if not isinstance(value, kinds):
            raise ValueError(f"{name} is {value!r}; expected something like {plain!r}")
    return read


def _tensors(source: SourceLayer) -> dict[str, Tensor]:
    tensors = {name: value.detach().cpu() for name, value in source.named_parameters()}
    tensors["W_dec"] = tensors["W_dec"].unflatten(1, (source.later, source.d_out))
    return {name: value.contiguous() for name, value in tensors.items()}


def _shapes(cfg: CLTConfig, index: int) -> dict[str, tuple[int, ...]]:
    """What the file of the layer at `index` holds."""
    return {
        "W_enc": (cfg.d_in, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, cfg.later(index), cfg.d_out),
        "b_dec": (cfg.d_out,),
        "threshold": (cfg.d_sae,),
    }


def _refuse_other_shapes(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    shapes = safetensors_shapes(path)
    odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if odd:
        listed = ", ".join(
            f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in odd
        )
        raise ValueError(f"{path} does not fit {CONFIG}: {listed}")
