"""Gemma Scope's format, `params.npz`: SAEs and transcoders of Gemma 2 (arXiv 2408.05147).

The arrays are W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc, b_dec and threshold, in float32 and
in the units of the model's activations; b_dec is not subtracted from the input. The file names
neither hook nor model. Tools read these from the folder's name on the hub, so only hooks that such
a name can express are written.

The SAEs of the embedding were trained without Gemma's factor sqrt(d_model), which is included in
`hook_embed`. On reading, W_enc is divided and W_dec multiplied by it, as in SAELens' loader.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jumprelu_plugin.formats.checking import Check, Loader
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.saelens import compare_sae
from jumprelu_plugin.formats.saelens_loaders import hub_files_from, load_with
from jumprelu_plugin.records import named
from jumprelu_plugin.saes.parameters import Parameters
from jumprelu_plugin.saes.tensor_files import read_npz

FILENAME = "params.npz"
LOADER = Loader("SAELens' Gemma Scope loader", "sae_lens", "sae-lens", "pip install sae-lens")

_KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
# By the hook inside the block: the release with SAEs of it, as SAELens' loader expects its name.
_RELEASES = {
    "hook_resid_post": "google/gemma-scope-2b-pt-res",
    "hook_mlp_out": "google/gemma-scope-2b-pt-mlp",
    "attn.hook_z": "google/gemma-scope-2b-pt-att",
}
_TRANSCODERS = "google/gemma-scope-2b-pt-transcoders"
_TRANSCODER_HOOKS = ("ln2.hook_normalized", "hook_mlp_out")
_EMBEDDING, _EMBEDDING_FOLDER = "hook_embed", "embedding"


def is_format(folder: Path) -> bool:
    """Whether the folder has a params.npz."""
    return (folder / FILENAME).is_file()


def read(
    folder: Path,
    *,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
) -> Dictionary:
    """Read a Gemma Scope SAE, or a transcoder if `hook_name_out` is given, without unpickling.

    If no hook is given and the path has a folder named `embedding`, as in the release, the SAE is
    taken as one of the embedding.

    Args:
        folder: the folder of params.npz.
        hook_name, hook_name_out, model_name: what the file does not name.

    Raises:
        ValueError: the archive is damaged, or holds pickled objects, wrong keys or shapes.
    """
    path = folder / FILENAME
    arrays = read_npz(path)
    # Some releases have w_enc; SAELens' loader takes both.
    arrays = {f"W_{key[2:]}" if key.startswith("w_") else key: v for key, v in arrays.items()}
    if sorted(arrays) != sorted(_KEYS):
        raise ValueError(f"{path} holds {sorted(arrays)}; expected {sorted(_KEYS)}")
    tensors = {key: torch.from_numpy(np.asarray(v, dtype=np.float32)) for key, v in arrays.items()}
    with named(path):
        parameters = Parameters.named(tensors)
    if hook_name is None and _EMBEDDING_FOLDER in folder.resolve().parts:
        hook_name = _EMBEDDING
    if hook_name == _EMBEDDING:
        parameters = _to_hook_embed(parameters)
    return Dictionary(parameters, hook_name, hook_name_out, model_name)


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write params.npz, with b_dec folded into b_enc.

    Raises:
        ValueError: the format cannot represent the hook or a skip connection.
    """
    _release(dictionary)
    tensors = dictionary.parameters.fold_b_dec().tensors()
    arrays: dict[str, Any] = {key: tensors[key].numpy() for key in _KEYS}
    np.savez(folder / FILENAME, **arrays)


def check(dictionary: Dictionary, folder: Path) -> Check:
    """Compare with the dictionary that SAELens' loader for Gemma Scope reads from the file."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    release, layer = _release(dictionary)
    loader = (
        loaders.gemma_2_transcoder_huggingface_loader
        if dictionary.is_transcoder
        else loaders.gemma_2_sae_huggingface_loader
    )
    parameters = dictionary.parameters
    # The loader reads sizes from the names ("2b", "width_16k"), which are wrong for other models.
    sizes = {"d_in": parameters.d_in, "d_sae": parameters.d_sae}
    if dictionary.is_transcoder:
        sizes["d_out"] = parameters.d_out
    with hub_files_from(folder):
        sae = load_with(loader, release, f"layer_{layer}/width_16k/average_l0_0", sizes)
    return compare_sae(parameters, sae, str(LOADER))


def _to_hook_embed(parameters: Parameters) -> Parameters:
    """The parameters for the embedding times sqrt(d_in), with b_dec as in SAELens' loader."""
    scale = parameters.d_in**0.5
    return replace(parameters, W_enc=parameters.W_enc / scale, W_dec=parameters.W_dec * scale)


def _release(dictionary: Dictionary) -> tuple[str, int]:
    """The release that holds dictionaries of this hook, and the layer."""
    if dictionary.has_skip:
        raise ValueError("params.npz cannot hold a skip connection; --to gemma-scope-2 can")
    layer, hook = dictionary.site()
    layer_out, hook_out = dictionary.site_out()
    if not dictionary.is_transcoder:
        if hook not in _RELEASES:
            raise ValueError(
                f"Gemma Scope's layout cannot name {dictionary.hook_name!r}, so tools would use "
                f"the file with another hook. It can name {', '.join(_RELEASES)} and the "
                f"transcoder's hooks {' -> '.join(_TRANSCODER_HOOKS)}"
            )
        return _RELEASES[hook], layer
    if (hook, hook_out) != _TRANSCODER_HOOKS or layer != layer_out:
        raise ValueError(
            f"Gemma Scope's transcoders read {_TRANSCODER_HOOKS[0]} and write "
            f"{_TRANSCODER_HOOKS[1]} of one layer; this one reads {dictionary.hook_name} and "
            f"writes {dictionary.hook_name_out}"
        )
    return _TRANSCODERS, layer
