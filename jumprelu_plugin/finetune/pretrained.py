"""A dictionary that somebody saved, on its way into a training and out of it again.

A saved dictionary reads raw activations x; SAELens trains on s·x, s its input scale. With n_i the
norm of decoder row i, the same function on s·x, its output s·x̂, is

    rows kept:    W_enc,      b_enc·s,      θ·s,      W_dec,      b_dec·s
    rows unit:    W_enc·n,    b_enc·s·n,    θ·s·n,    W_dec/n,    b_dec·s

so a latent's activation is in units of what it adds to s·x, as in a training from scratch. On the
way out every latent gets the row norm it came with, which leaves the function and restores units.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from jumprelu_plugin.formats import reading
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.saes.parameters import Parameters


def read(
    source: str | Path, *, hook_name: str | None = None, model_name: str | None = None
) -> Dictionary:
    """The SAE in a folder of any format that `formats.reading` knows, or in Gemma Scope's file.

    Args:
        hook_name, model_name: what the files do not say, or say otherwise.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: it holds no dictionary, a broken one (NaN, negative thresholds, missing or
            misshapen arrays), another architecture, or a transcoder.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"there is no {source}; give the folder of a saved SAE, or Gemma Scope's params.npz"
        )
    folder = source.parent if source.is_file() else source
    if source.is_file() and source.name not in ("params.npz", "params.safetensors", "cfg.json"):
        raise ValueError(
            f"{source} is not a dictionary's file: give the folder of a saved SAE, or Gemma "
            "Scope's params.npz under that name"
        )
    # A mid-training checkpoint keeps its input scale beside its weights.
    dictionary = reading.load_dictionary(
        folder, fold_scale=True, hook_name=hook_name, model_name=model_name
    )
    if dictionary.is_transcoder:
        raise ValueError(
            f"{source} holds a transcoder ({dictionary.hook_name} -> {dictionary.hook_name_out}); "
            "only SAEs, which read and write one hook, are trained further here"
        )
    return dictionary


def scaled(parameters: Parameters, scale: float, *, unit_rows: bool) -> Parameters:
    """The parameters that do to scale·x what `parameters` do to x.

    Raises:
        ValueError: the scale is not a positive finite number.
    """
    moved = parameters.fold_scales(1 / scale) if scale > 0 else parameters.fold_scales(scale)
    if unit_rows:
        return moved.fold_decoder_norms()
    return moved.with_decoder_norms(decoder_norms(parameters))


def decoder_norms(parameters: Parameters) -> Float[Tensor, " d_sae"]:
    """Norms of the decoder rows, 1 for a row of zeros."""
    norms = parameters.W_dec.double().norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)


def load_(sae: TrainingSAE[Any], parameters: Parameters) -> None:
    """Give a training SAE these parameters, in place; calibration then leaves them alone."""
    state = dict(parameters.tensors())
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)


def restore_norms_(sae: TrainingSAE[Any], norms: Float[Tensor, " d_sae"]) -> None:
    """Give every latent of a trained SAE a decoder row of this norm, in place: same function."""
    load_(sae, Parameters.of(sae).with_decoder_norms(norms))
