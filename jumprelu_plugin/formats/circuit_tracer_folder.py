"""Looks through a folder in circuit-tracer's format before circuit-tracer reads it.

circuit-tracer believes the folder: a missing last layer gives a graph of the wrong size, and a
missing field or a damaged file ends in the error of some library. Here every file's header is read
first, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jumprelu_plugin.records import require_file, text_field
from jumprelu_plugin.saes.tensor_files import safetensors_shapes

CONFIG = "config.yaml"
SET, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"
_LAYER_FILE = re.compile(r"^layer_(\d+)\.safetensors$")
_ENCODER_FILE = re.compile(r"^W_enc_(\d+)\.safetensors$")
_THRESHOLD = "activation_function.threshold"
_MOST_CONFIG = 1_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """What config.yaml says, as plain values: no tags of Python objects are followed.

    Raises:
        ValueError: it is not YAML, not a mapping, too large, or lacks a field.
        OSError: it cannot be opened.
    """
    path = folder / CONFIG
    require_file(path)
    with path.open("rb") as file:
        raw = file.read(_MOST_CONFIG + 1)
    if len(raw) > _MOST_CONFIG:
        raise ValueError(f"{path} has more than {_MOST_CONFIG:,} bytes; expected a few lines")
    try:
        config = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({error}): write or download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}; expected fields such as scan")
    if config.get("model_kind") not in (SET, CROSS_LAYER):
        raise ValueError(
            f"{path} has model_kind {config.get('model_kind')!r}; expected {SET} or {CROSS_LAYER}"
        )
    for name in ("feature_input_hook", "feature_output_hook"):
        if text_field(config, name, path) is None:
            raise ValueError(f"{path} has no {name}; expected a hook such as hook_mlp_out")
    text_field(config, "model_name", path)
    text_field(config, "scan", path)
    return config


def require_readable(folder: Path) -> None:
    """Refuse a folder that circuit-tracer would not read, or would read wrongly.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the others.
        OSError: a file cannot be opened.
    """
    kind = read_config(folder)["model_kind"]
    pattern = _LAYER_FILE if kind == SET else _ENCODER_FILE
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := pattern.match(path.name))
    }
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(
            f"{folder} holds files of the layers {sorted(found)}; expected one for every layer of "
            "the model, from 0 on: export or download the whole folder again"
        )
    first: tuple[int, ...] | None = None
    for layer, path in sorted(found.items()):
        own = _of_set(path) if kind == SET else _of_cross_layer(path, layer, len(found))
        if first not in (None, own):
            raise ValueError(
                f"{path} has [d_sae, d_model] = {list(own)}, and the layers before it "
                f"{list(first or ())}; all layers have the same"
            )
        first = own


def _of_set(path: Path) -> tuple[int, ...]:
    shapes = safetensors_shapes(path)
    width = _encoder_shape(shapes, "W_enc", path)
    d_sae, d_model = width
    expected = {
        "W_enc": width,
        "W_dec": width,
        "b_enc": (d_sae,),
        "b_dec": (d_model,),
        _THRESHOLD: (d_sae,),
    }
    if "W_skip" in shapes:
        expected["W_skip"] = (d_model, d_model)
    _refuse_others(shapes, expected, path)
    return width


def _of_cross_layer(path: Path, layer: int, layers: int) -> tuple[int, ...]:
    shapes = safetensors_shapes(path)
    width = _encoder_shape(shapes, f"W_enc_{layer}", path)
    d_sae, d_model = width
    vectors = {f"{name}_{layer}": (d_sae,) for name in ("b_enc", "threshold")}
    expected = {f"W_enc_{layer}": width, f"b_dec_{layer}": (d_model,), **vectors}
    _refuse_others(shapes, expected, path)
    decoder = path.with_name(f"W_dec_{layer}.safetensors")
    later = {f"W_dec_{layer}": (d_sae, layers - layer, d_model)}
    _refuse_others(safetensors_shapes(decoder), later, decoder)
    return width


def _encoder_shape(shapes: Mapping[str, tuple[int, ...]], name: str, path: Path) -> tuple[int, int]:
    shape = shapes.get(name, ())
    if len(shape) != 2:
        raise ValueError(f"{path} has {name} {list(shape) or 'nowhere'}; expected [d_sae, d_model]")
    return shape[0], shape[1]


def _refuse_others(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(f"{path} has {name} {shapes.get(name)}; expected {shape}")
