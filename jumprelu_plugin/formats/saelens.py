"""SAELens' own folder: cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jumprelu_plugin.formats.checking import Check, Loader, compare
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.hooks import flat_input, require_folded
from jumprelu_plugin.saes.parameters import Parameters

LOADER = Loader("SAE.load_from_disk", "sae_lens", "sae-lens", "pip install sae-lens")

_SCALER = "activation_scaler.json"
_KNOWN = ("hook_name", "hook_name_out", "model_name")


def write(dictionary: Dictionary, folder: Path) -> None:
    """cfg.json and sae_weights.safetensors, of a stock architecture."""
    dictionary.as_sae().save_model(folder)


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with what `SAE.load_from_disk` makes of the folder."""
    from sae_lens import SAE

    return compare_sae(dictionary.parameters, SAE.load_from_disk(folder), str(LOADER))


def compare_sae(parameters: Parameters, sae: Any, loader: str) -> Check:
    """Compare parameters with a loaded SAELens object."""
    sae.eval()
    with flat_input(sae):
        return compare(parameters, sae.encode, sae.forward, loader)


def is_here(folder: Path) -> bool:
    return (folder / "cfg.json").is_file()


def read(folder: Path, *, fold_scale: bool = False) -> Dictionary:
    """A saved SAE or transcoder, its outputs compared with SAELens' own.

    Args:
        fold_scale: fold the input scale that a mid-training checkpoint keeps beside its weights.

    Raises:
        ValueError: for another architecture, files that do not fit together, or a scale that is
            not folded.
    """
    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no whole SAE: {error}") from error
    except Exception as error:  # SAELens, safetensors and torch each raise their own
        raise ValueError(
            f"SAELens cannot load {folder}: {error}\nExpected cfg.json and sae_weights.safetensors "
            "as SAELens saves them"
        ) from error
    if not hasattr(sae, "threshold"):
        raise ValueError(
            f"{folder} holds a {sae.cfg.architecture()!r}: only JumpReLU dictionaries are exported"
        )
    sae = sae.to(dtype=torch.float32, device="cpu")
    dictionary = of(sae)
    scale = _scales_beside(sae, folder, fold_scale)
    normalization = sae.cfg.normalize_activations
    if scale is None:
        require_folded(sae)
        if normalization != "none":
            raise ValueError(
                f"{folder} has normalize_activations={normalization!r}, which scales every token "
                "by its own statistics: no other format has that"
            )
    compare_sae(dictionary.parameters, sae, "SAELens")
    if scale is None:
        return dictionary
    return replace(dictionary, parameters=dictionary.parameters.fold_scales(*scale))


def of(sae: Any) -> Dictionary:
    """The dictionary in a SAELens inference object."""
    metadata = sae.cfg.metadata.to_dict()
    return Dictionary(
        parameters=Parameters.of(sae),
        hook_name=metadata.get("hook_name"),
        hook_name_out=metadata.get("hook_name_out"),
        model_name=metadata.get("model_name"),
        metadata={name: value for name, value in metadata.items() if name not in _KNOWN},
    )


def _scales_beside(sae: Any, folder: Path, fold_scale: bool) -> tuple[float, float] | None:
    """The scales of input and output that a mid-training checkpoint keeps beside its weights.

    SAELens keeps one number for an SAE; a transcoder's checkpoint keeps two.

    Raises ValueError for scales that may not be folded unasked, or cannot be folded.
    """
    scaler = folder / _SCALER
    kept = json.loads(scaler.read_text()) if scaler.is_file() else {}
    finished = "Export the folder that the finished training saved"
    if kept.get("has_whitening"):
        raise ValueError(f"{folder} is a mid-training checkpoint on whitened inputs. {finished}")
    scale = kept.get("scaling_factor")
    if scale is None:
        return None
    scales = tuple(map(float, scale if isinstance(scale, list) else [scale]))
    sides = 2 if hasattr(sae.cfg, "d_out") else 1
    if len(scales) != sides:
        raise ValueError(
            f"{folder} is a mid-training checkpoint of {type(sae).__name__}, which has {sides} "
            f"scale(s), and {_SCALER} holds {scale}. {finished}"
        )
    if not fold_scale:
        raise ValueError(
            f"{folder} is a mid-training checkpoint: its weights expect inputs multiplied by "
            f"{scales[0]:.6g} ({_SCALER}), and every tool would feed them unscaled ones. "
            f"{finished}, or pass --fold_scale to fold the scale in now"
        )
    return scales[0], scales[-1]
