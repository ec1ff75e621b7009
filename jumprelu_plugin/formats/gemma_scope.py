"""Gemma Scope's `params.npz`, for Gemma 2's SAEs and transcoders (arXiv 2408.05147).

Arrays W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc, b_dec, threshold, float32, in the model's
own units; b_dec is not subtracted from the input. The file does not say which hook or model it
belongs to: tools read that from the folder's name on the hub, so only the sites that such a name
can say are written.

SAEs of the embedding were trained on it without Gemma's factor sqrt(d_model), which `hook_embed`
has: they are read, as SAELens' loader reads them, with W_enc divided and W_dec multiplied by it.
"""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jumprelu_plugin.formats.checking import Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.saelens import compare_sae
from jumprelu_plugin.formats.saelens_loaders import load_with, redirected
from jumprelu_plugin.saes.parameters import Parameters

FILENAME = "params.npz"
LOADER = Loader("SAELens' Gemma Scope loader", "sae_lens", "sae-lens", "pip install sae-lens")

_KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
# Hook inside the block: the release that holds SAEs of it, as SAELens' loader expects its name.
_RELEASES = {
    "hook_resid_post": "google/gemma-scope-2b-pt-res",
    "hook_mlp_out": "google/gemma-scope-2b-pt-mlp",
    "attn.hook_z": "google/gemma-scope-2b-pt-att",
}
_TRANSCODERS = "google/gemma-scope-2b-pt-transcoders"
_TRANSCODER_HOOKS = ("ln2.hook_normalized", "hook_mlp_out")
_EMBEDDING, _EMBEDDING_FOLDER = "hook_embed", "embedding"


def write(dictionary: Dictionary, folder: Path) -> None:
    """params.npz, b_dec folded into b_enc.

    Raises:
        ValueError: for a hook or a skip connection that the format has no place for.
    """
    _release(dictionary)
    tensors = dictionary.parameters.fold_b_dec().tensors()
    arrays: dict[str, Any] = {key: tensors[key].numpy() for key in _KEYS}
    np.savez(folder / FILENAME, **arrays)


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with what SAELens' own loader for Gemma Scope makes of the file."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    release, layer = _release(dictionary)
    loader = (
        loaders.gemma_2_transcoder_huggingface_loader
        if dictionary.is_transcoder
        else loaders.gemma_2_sae_huggingface_loader
    )
    parameters = dictionary.parameters
    # The loader takes sizes from names ("2b", "width_16k"), which know no other model.
    sizes = {"d_in": parameters.d_in, "d_sae": parameters.d_sae}
    if dictionary.is_transcoder:
        sizes["d_out"] = parameters.d_out
    with redirected(folder):
        sae = load_with(loader, release, f"layer_{layer}/width_16k/average_l0_0", sizes)
    return compare_sae(parameters, sae, str(LOADER))


def is_here(folder: Path) -> bool:
    return (folder / FILENAME).is_file()


def read(
    folder: Path,
    *,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
) -> Dictionary:
    """A Gemma Scope SAE or, where `hook_name_out` is given, transcoder. Never unpickles.

    The release keeps SAEs of the embedding in a folder `embedding`, which tells them apart where
    no hook is given.

    Raises:
        ValueError: the archive holds pickled objects, wrong keys or wrong shapes.
    """
    path = folder / FILENAME
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is not an archive of plain arrays ({error}). Pickled objects are never "
            "loaded, because unpickling runs code; get the file from its authors again"
        ) from error
    # Some releases write w_enc; SAELens' loader takes both.
    arrays = {f"W_{key[2:]}" if key.startswith("w_") else key: v for key, v in arrays.items()}
    if sorted(arrays) != sorted(_KEYS):
        raise ValueError(f"{path} holds {sorted(arrays)}; expected {sorted(_KEYS)}")
    tensors = {key: torch.from_numpy(np.asarray(v, dtype=np.float32)) for key, v in arrays.items()}
    try:
        parameters = Parameters.named(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if hook_name is None and _EMBEDDING_FOLDER in folder.resolve().parts:
        hook_name = _EMBEDDING
    if hook_name == _EMBEDDING:
        parameters = _to_hook_embed(parameters)
    return Dictionary(parameters, hook_name, hook_name_out, model_name)


def _to_hook_embed(parameters: Parameters) -> Parameters:
    """The parameters for the embedding times sqrt(d_in); b_dec stays, as in SAELens' loader."""
    scale = parameters.d_in**0.5
    return replace(parameters, W_enc=parameters.W_enc / scale, W_dec=parameters.W_dec * scale)


def _release(dictionary: Dictionary) -> tuple[str, int]:
    """The kind of release that holds such a dictionary, and its layer."""
    if dictionary.has_skip:
        raise ValueError(
            "params.npz has no place for a skip connection: use --to gemma-scope-2, which has"
        )
    layer, hook = dictionary.site()
    layer_out, hook_out = dictionary.site_out()
    if not dictionary.is_transcoder:
        if hook not in _RELEASES:
            raise ValueError(
                f"Gemma Scope's layout cannot say {dictionary.hook_name!r}: tools would take the "
                f"file for another hook's. It knows {', '.join(_RELEASES)} and the transcoder "
                f"{' -> '.join(_TRANSCODER_HOOKS)}"
            )
        return _RELEASES[hook], layer
    if (hook, hook_out) != _TRANSCODER_HOOKS or layer != layer_out:
        raise ValueError(
            f"Gemma Scope's transcoders read {_TRANSCODER_HOOKS[0]} and write "
            f"{_TRANSCODER_HOOKS[1]} of one layer; this one reads {dictionary.hook_name} and "
            f"writes {dictionary.hook_name_out}"
        )
    return _TRANSCODERS, layer
