"""SAELens' format: cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from jumprelu_plugin.formats.checking import Check, Loader, compare_dictionary
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.models.hooks import flat_input, require_folded
from jumprelu_plugin.records import is_number, named, read_json, require_file, text_field
from jumprelu_plugin.saes.parameters import PairScale, Parameters, fold_scales_

LOADER = Loader("SAE.load_from_disk", "sae_lens", "sae-lens", "pip install sae-lens")

_SCALER = "activation_scaler.json"
# Metadata that `Dictionary` keeps in fields of its own.
_DICTIONARY_FIELDS = ("hook_name", "hook_name_out", "model_name")


def is_format(folder: Path) -> bool:
    """Whether the folder has SAELens' cfg.json."""
    return (folder / "cfg.json").is_file()


def read(folder: Path, *, fold_scale: bool = False) -> Dictionary:
    """Read a saved SAE or transcoder, and compare its outputs with SAELens'.

    Args:
        folder: a finished dictionary or a checkpoint.
        fold_scale: fold the input scale of a checkpoint into its parameters.

    Raises:
        ValueError: SAELens cannot load the folder, the architecture is not JumpReLU, or inputs are
            normalized in a way that is not folded.
    """
    sae = load_sae(folder)
    if not hasattr(sae, "threshold"):
        raise ValueError(
            f"{folder} holds a {sae.cfg.architecture()!r}: only JumpReLU dictionaries are exported"
        )
    sae = sae.to(dtype=torch.float32, device="cpu")
    with named(folder):
        dictionary = from_sae(sae)
    scales = _checkpoint_scales(sae, folder, fold_scale)
    normalization = sae.cfg.normalize_activations
    if scales is None:
        with named(folder):
            require_folded(sae)
        if normalization != "none":
            raise ValueError(
                f"{folder} has normalize_activations={normalization!r}, which scales each token by "
                "its own statistics; no other format can represent that"
            )
    with named(folder):
        compare_sae(dictionary.parameters, sae, "SAELens")
        if scales is None:
            return dictionary
        folded = dictionary.parameters.fold_scales(*scales)
    return replace(dictionary, parameters=folded)


def load_sae(folder: Path, device: str = "cpu") -> Any:
    """SAELens' inference object in a folder, of whatever architecture.

    Raises:
        ValueError: SAELens cannot load the folder, or its metadata has a value of another type than
            SAELens writes.
    """
    if is_format(folder):
        _refuse_damaged_config(folder / SAE_CFG_FILENAME)
    weights = folder / SAE_WEIGHTS_FILENAME
    if weights.exists():  # safetensors waits for a pipe without end, and no signal reaches it
        require_file(weights)
    try:
        sae = load_inference_sae(folder, device)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no complete SAE: {error}") from error
    except Exception as error:  # SAELens, safetensors and torch raise different types
        raise ValueError(
            f"SAELens cannot load {folder}: {error}\nExpected cfg.json and sae_weights.safetensors "
            "as SAELens saves them"
        ) from error
    metadata = sae.cfg.metadata.to_dict()
    for name in (*_DICTIONARY_FIELDS, "model_class_name", "dataset_path"):
        text_field(metadata, name, folder / SAE_CFG_FILENAME)
    _refuse_damaged_metadata(metadata, folder / SAE_CFG_FILENAME)
    return sae


def load_folded_sae(folder: Path, device: str = "cpu") -> Any:
    """SAELens' inference object in a folder, with the input scale of a checkpoint folded into it.

    Raises:
        ValueError: as `load_sae` does, or the checkpoint's inputs are whitened.
    """
    sae = load_sae(folder, device)
    scales = _checkpoint_scales(sae, folder, fold_scale=True)
    if scales is None:
        return sae
    logger.warning(f"{folder} is a checkpoint of an unfinished training; its input scale is folded")
    if hasattr(sae.cfg, "d_out"):
        fold_scales_(sae, *scales)
    else:
        sae.fold_activation_norm_scaling_factor(scales.scale_in)
    sae.cfg.normalize_activations = "none"
    return sae


def _refuse_damaged_metadata(metadata: Mapping[str, Any], path: Path) -> None:
    """Name the entry of another type than SAELens writes, which would mean something else."""

    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    def ids(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(whole(token, 0) for token in value)

    flags = {
        name: (lambda value: isinstance(value, bool), "true or false")
        for name in ("prepend_bos", "disable_concat_sequences")
    }
    expected: dict[str, tuple[Callable[[Any], bool], str]] = {
        **flags,
        "context_size": (lambda value: whole(value, 1), "a whole number from 1 on"),
        "hook_head_index": (lambda value: whole(value, 0), "a whole number from 0 on"),
        "exclude_special_tokens": (
            lambda value: isinstance(value, bool) or ids(value),
            "true, false or a list of token ids",
        ),
    }
    for name, (fits, kind) in expected.items():
        value = metadata.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{path} has {name} {value!r}; expected {kind}")


def _refuse_damaged_config(path: Path) -> None:
    """Name the field that holds no value of its type, which SAELens would find later, or never."""
    config = read_json(path)
    for name in ("architecture", "dtype", "normalize_activations", "reshape_activations"):
        text_field(config, name, path)
    sizes = [config.get("d_in"), config.get("d_sae"), config.get("d_out", 1)]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            f"{path} has d_in {sizes[0]!r}, d_sae {sizes[1]!r} and d_out "
            f"{config.get('d_out')!r}; expected whole numbers from 1 on"
        )
    subtracts = config.get("apply_b_dec_to_input", True)
    if not isinstance(subtracts, bool):
        raise ValueError(f"{path} has apply_b_dec_to_input {subtracts!r}; expected true or false")
    if not isinstance(config.get("metadata", {}), dict):
        raise ValueError(f"{path} has metadata {config['metadata']!r}; expected an object")


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write cfg.json and sae_weights.safetensors of a stock architecture."""
    dictionary.as_sae().save_model(folder)


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with the SAE that `SAE.load_from_disk` loads from the folder."""
    return compare_sae(dictionary.parameters, load_inference_sae(folder), str(LOADER))


def load_inference_sae(folder: Path, device: str = "cpu") -> Any:
    """What `SAE.load_from_disk` gives, without its advice on loading the model; raises as it does.

    SAELens warns of recorded `model_from_pretrained_kwargs`. Here they are used.
    """
    from sae_lens import SAE

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        return SAE.load_from_disk(folder, device)


def from_sae(sae: Any) -> Dictionary:
    """The dictionary of a SAELens inference object."""
    metadata = sae.cfg.metadata.to_dict()
    return Dictionary(
        parameters=Parameters.of(sae),
        hook_name=metadata.get("hook_name"),
        hook_name_out=metadata.get("hook_name_out"),
        model_name=metadata.get("model_name"),
        metadata={
            name: value for name, value in metadata.items() if name not in _DICTIONARY_FIELDS
        },
    )


def compare_sae(parameters: Parameters, sae: Any, loader: str) -> Check:
    """Compare parameters with a SAELens object that a loader gave."""
    sae.eval()
    with flat_input(sae):
        return compare_dictionary(parameters, sae.encode, sae.forward, loader)


def _checkpoint_scales(sae: Any, folder: Path, fold_scale: bool) -> PairScale | None:
    """The scales of input and output of a checkpoint from the middle of a training, or None.

    SAELens saves one number for an SAE. A transcoder's checkpoint has two, and may have the centers
    that were subtracted.

    Raises:
        ValueError: `fold_scale` is False and there are scales, or they cannot be folded.
    """
    path = folder / _SCALER
    scaler = read_json(path) if path.is_file() else {}
    advice = "Export the folder that the finished training saved"
    if scaler.get("has_whitening"):
        raise ValueError(f"{folder} is a checkpoint with whitened inputs. {advice}")
    scale = scaler.get("scaling_factor")
    if scale is None:
        return None
    scales = scale if isinstance(scale, list) else [scale]
    if not _are_scales(scales):
        raise ValueError(
            f"{path} has scaling_factor {scale!r}; expected a positive number, or two and the two "
            f"centers of a transcoder. {advice}"
        )
    sides = 2 if hasattr(sae.cfg, "d_out") else 1
    if len(scales) not in ((1,) if sides == 1 else (2, 4)):
        raise ValueError(
            f"{folder} is a checkpoint of {type(sae).__name__}, which has {sides} scale(s), and "
            f"{_SCALER} holds {scale}. {advice}"
        )
    if not fold_scale:
        raise ValueError(
            f"{folder} is a checkpoint whose weights expect inputs multiplied by {scales[0]:.6g} "
            f"({_SCALER}), while other tools do not scale inputs. {advice}, or pass --fold_scale "
            "to fold the scale into the weights"
        )
    widths = [sae.cfg.d_in, getattr(sae.cfg, "d_out", 0)][: max(0, len(scales) - 2)]
    if [len(center) for center in scales[2:]] != widths:
        raise ValueError(f"{path} has centers of other widths than {widths}. {advice}")
    number = float(scales[0])
    return PairScale(number, number) if sides == 1 else PairScale.of(scales)


def _are_scales(scales: list[Any]) -> bool:
    """Whether these are one or two positive numbers and lists of numbers after them."""
    numbers, centers = scales[:2], scales[2:]
    return all(is_number(value) and value > 0 for value in numbers) and all(
        isinstance(center, list) and all(map(is_number, center)) for center in centers
    )
