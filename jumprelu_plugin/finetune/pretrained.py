"""Reads a pretrained dictionary, and converts its parameters to training units and back.

A saved dictionary reads raw activations x. SAELens trains on s·x, where s is its input scale. The
same function on s·x, with output s·x̂, has the parameters

    original rows:    W_enc,      b_enc·s,      θ·s,      W_dec,      b_dec·s
    unit rows:        W_enc·n,    b_enc·s·n,    θ·s·n,    W_dec/n,    b_dec·s

where n_i is the norm of decoder row i. With unit rows, a latent's activation is the norm of its
contribution to s·x̂, as in training from scratch. After training, each decoder row gets its original
norm back, which restores the units of the activations and does not change the function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.reading import load_dictionary
from jumprelu_plugin.saes.parameters import Parameters


def read_pretrained(
    source: str | Path, *, hook_name: str | None = None, model_name: str | None = None
) -> Dictionary:
    """Read an SAE from a folder in any format of `load_dictionary`, or from Gemma Scope's file.

    Args:
        source: the folder, or Gemma Scope's params.npz.
        hook_name, model_name: override the names in the files, or replace missing ones.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `source` holds no dictionary, one of another architecture, a transcoder, or
            invalid arrays (missing, of a wrong shape, with NaN, or with negative thresholds).
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(
            f"there is no {source}; give the folder of a saved SAE, or Gemma Scope's params.npz"
        )
    # A checkpoint from the middle of a training has its input scale in a separate file.
    dictionary = load_dictionary(
        source, fold_scale=True, hook_name=hook_name, model_name=model_name
    )
    if dictionary.is_transcoder:
        raise ValueError(
            f"{source} holds a transcoder ({dictionary.hook_name} -> {dictionary.hook_name_out}); "
            "only SAEs, which read and write the same hook, can be finetuned"
        )
    return dictionary


def rescale(parameters: Parameters, scale: float, *, unit_rows: bool) -> Parameters:
    """The parameters of the same function on scale·x, whose output is scale·x̂.

    Args:
        parameters: a dictionary on raw activations.
        scale: s, positive and finite.
        unit_rows: whether decoder rows get unit norm; otherwise they keep their norms.

    Raises:
        ValueError: the scale is not a positive finite number.
    """
    rescaled = parameters.fold_scales(1 / scale) if scale > 0 else parameters.fold_scales(scale)
    if unit_rows:
        return rescaled.fold_decoder_norms()
    return rescaled.with_decoder_norms(decoder_norms(parameters))


def decoder_norms(parameters: Parameters) -> Float[Tensor, " d_sae"]:
    """The norms of the decoder rows, [d_sae], and 1 for a row of zeros."""
    norms = parameters.W_dec.double().norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)


def load_parameters_(sae: TrainingSAE[Any], parameters: Parameters) -> None:
    """Load the parameters into a training SAE, in place. Calibration then does not change them."""
    state = dict(parameters.tensors())
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)


def restore_decoder_norms_(sae: TrainingSAE[Any], norms: Float[Tensor, " d_sae"]) -> None:
    """Scale a trained SAE's decoder rows to these norms, in place, keeping its function."""
    load_parameters_(sae, Parameters.of(sae).with_decoder_norms(norms))
