"""circuit-tracer's format of a cross-layer transcoder.

`config.yaml` has `model_kind: cross_layer_transcoder` and names the hooks. `W_enc_{i}.safetensors`
holds W_enc_{i} [d_sae, d_model] (transposed against SAELens), b_enc_{i}, b_dec_{i}, threshold_{i}.
`W_dec_{i}.safetensors` holds W_dec_{i} [d_sae, layers from i on, d_model]. circuit-tracer counts
the encoder files, so a missing one gives a graph of the wrong size.
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
    TOLERANCE,
    Check,
    compare_outputs,
    expected_activations,
    random_inputs,
    require_shape,
)
from jumprelu_plugin.transcoders.clt import folder as folders
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder

_BLOCK = "blocks.{layer}."


def read_clt(folder: Path, n_layers: int) -> CrossLayerTranscoder:
    """Read a trained cross-layer transcoder that can be exported for a model of `n_layers`.

    Args:
        folder: a folder that `save_clt` wrote.
        n_layers: number of layers of the model.

    Raises:
        ValueError: the folder is invalid, or circuit-tracer cannot represent its transcoder.
    """
    model = folders.load_clt(folder)
    _check_representable(model.cfg, n_layers)
    return model


def write(model: CrossLayerTranscoder, folder: Path, *, model_name: str, scan: str) -> None:
    """Write config.yaml, and a file with the encoder and one with the decoder of each layer.

    Args:
        model: one with all layers of the language model (`read_clt`).
        folder: the folder to write to.
        model_name: the language model, as circuit-tracer names it.
        scan: the name of the transcoder.
    """
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
    """Compare with the cross-layer transcoder that circuit-tracer loads from the folder."""
    loaded = circuit_tracer.load_transcoders(folder)
    return compare_clt(model, loaded, str(circuit_tracer.LOADER))


@torch.no_grad()
def compare_clt(
    model: CrossLayerTranscoder, loaded: Any, loader: str, tolerance: float = TOLERANCE
) -> Check:
    """Compare a loaded cross-layer transcoder in float32 with the original in float64.

    Args:
        model: the original.
        loaded: has `encode` and `__call__`, which take [layers, n, d_model].
        loader: name of the loader, for messages.
        tolerance: the largest relative error that passes.

    Raises:
        ValueError: activations or outputs differ by more than `tolerance`, or rounding decides of
            too many activations whether the latent fires.
    """
    x = torch.stack(
        [random_inputs(s.parameters_to_all(), seed) for seed, s in enumerate(model.sources)]
    )
    exact = copy.deepcopy(model).double()
    activations = loaded.encode(x)
    require_shape(activations, exact.encode(x.double()))
    f = torch.stack(
        [
            expected_activations(source.parameters_to_all(), part, found)
            for source, part, found in zip(exact.sources, x.double(), activations, strict=True)
        ]
    )
    outputs = {"activations": (activations, f), "outputs": (loaded(x), exact.decode(f))}
    return compare_outputs(loader, outputs, x.shape[1], f, tolerance)


def _check_representable(cfg: CLTConfig, n_layers: int) -> None:
    if cfg.layers != tuple(range(n_layers)):
        raise ValueError(
            f"the transcoder has layers {cfg.layers[0]} to {cfg.layers[-1]}, and the model "
            f"{n_layers}: circuit-tracer needs all layers, and would give a graph of the wrong "
            "size. Train all layers (leave out --layers)"
        )
    for hook, allowed, verb in (
        (cfg.hook_in, circuit_tracer.INPUTS, "read"),
        (cfg.hook_out, circuit_tracer.OUTPUTS, "write"),
    ):
        if hook not in [_BLOCK + name for name in allowed]:
            raise ValueError(
                f"circuit-tracer replaces MLPs by transcoders that {verb} "
                f"{' or '.join(_BLOCK + name for name in allowed)}; this one {verb}s {hook}"
            )
    if cfg.d_in != cfg.d_out:
        raise ValueError(
            "circuit-tracer's transcoders read and write the residual stream's width; this one "
            f"reads width {cfg.d_in} and writes width {cfg.d_out}"
        )
