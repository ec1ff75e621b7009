"""circuit-tracer's folder of a cross-layer transcoder.

`config.yaml` says `model_kind: cross_layer_transcoder` and the hooks. `W_enc_{i}.safetensors` holds
W_enc_{i} [d_sae, d_model] (transposed against SAELens), b_enc_{i}, b_dec_{i} and threshold_{i};
`W_dec_{i}.safetensors` W_dec_{i} [d_sae, layers from i on, d_model]. It counts the encoder files to
know the number of layers, so one too few gives a graph of the wrong size.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from jumprelu_plugin.formats import circuit_tracer
from jumprelu_plugin.formats.checking import (
    FEWEST_INPUTS,
    TOLERANCE,
    Check,
    agreement,
    far_from_thresholds,
    random_inputs,
)
from jumprelu_plugin.transcoders.clt import folder as folders
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder

_BLOCK = "blocks.{layer}."


def read(folder: Path, n_layers: int) -> CrossLayerTranscoder:
    """A finished cross-layer transcoder that circuit-tracer can take for a model of `n_layers`.

    Raises:
        ValueError: the folder is broken, or holds one that circuit-tracer cannot take.
    """
    model = folders.load_clt(folder)
    _check_fit(model.cfg, n_layers)
    return model


def write(model: CrossLayerTranscoder, folder: Path, *, model_name: str, scan: str) -> None:
    """config.yaml, and an encoder's and a decoder's file a layer."""
    for index, source in enumerate(model.sources):
        encoder = {
            f"W_enc_{index}": source.W_enc.t(),
            f"b_enc_{index}": source.b_enc,
            f"b_dec_{index}": source.b_dec,
            f"threshold_{index}": source.threshold,
        }
        decoder = {f"W_dec_{index}": source.W_dec.unflatten(1, (source.later, source.d_out))}
        for name, tensors in (("W_enc", encoder), ("W_dec", decoder)):
            plain = {key: value.detach().contiguous() for key, value in tensors.items()}
            save_file(plain, folder / f"{name}_{index}.safetensors")
    config = {
        "model_kind": "cross_layer_transcoder",
        "model_name": model_name,
        "feature_input_hook": model.cfg.hook_in.removeprefix(_BLOCK),
        "feature_output_hook": model.cfg.hook_out.removeprefix(_BLOCK),
        "scan": scan,
    }
    (folder / circuit_tracer.CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def check(model: CrossLayerTranscoder, folder: Path) -> Check:
    """Compare all latents and outputs with what circuit-tracer makes of the folder."""
    return compare(model, circuit_tracer.load(folder), str(circuit_tracer.LOADER))


@torch.no_grad()
def compare(
    model: CrossLayerTranscoder, loaded: Any, loader: str, tolerance: float = TOLERANCE
) -> Check:
    """Compare a loaded cross-layer transcoder with the one it should be, computed in float64.

    Args:
        loaded: has `encode` and `__call__` over [layers, n, d_model], in float32.

    Raises:
        ValueError: outputs that differ by more than `tolerance`, or nothing to compare.
    """
    x = torch.stack(
        [random_inputs(s.parameters_to_all(), seed) for seed, s in enumerate(model.sources)]
    )
    exact = copy.deepcopy(model).double()
    far = torch.stack(
        [
            far_from_thresholds(source.parameters_to_all(), part)
            for source, part in zip(exact.sources, x.double().unbind(0), strict=True)
        ]
    )
    x = x[:, far.all(0)]
    if x.shape[1] < FEWEST_INPUTS:
        raise ValueError(
            f"{len(far[0]) - x.shape[1]} of {len(far[0])} random inputs put some latent so close "
            "to its threshold that rounding decides whether it fires, so nothing can be compared: "
            "are the scales of W_enc and threshold what they should be?"
        )
    f = exact.encode(x.double())
    outputs = {
        "activations": (loaded.encode(x), f),
        "outputs": (loaded(x), exact.decode(f)),
    }
    return agreement(loader, outputs, x.shape[1], f, tolerance)


def _check_fit(cfg: CLTConfig, n_layers: int) -> None:
    if cfg.layers != tuple(range(n_layers)):
        raise ValueError(
            f"the transcoder has layers {cfg.layers[0]} to {cfg.layers[-1]}, and the model "
            f"{n_layers}: circuit-tracer needs every layer of the model, and would run on fewer "
            "and give a graph of the wrong size. Train all (leave out --layers)"
        )
    for hook, allowed, verb in (
        (cfg.hook_in, circuit_tracer.INPUTS, "read"),
        (cfg.hook_out, circuit_tracer.OUTPUTS, "write"),
    ):
        if hook not in [_BLOCK + name for name in allowed]:
            raise ValueError(
                f"circuit-tracer replaces MLPs, with transcoders that {verb} "
                f"{' or '.join(_BLOCK + name for name in allowed)}; this one {verb}s {hook}"
            )
    if cfg.d_in != cfg.d_out:
        raise ValueError(
            "circuit-tracer's transcoders read and write the residual stream's width; this one "
            f"reads {cfg.d_in} and writes {cfg.d_out}"
        )
