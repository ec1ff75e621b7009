"""Reads a dictionary in any of the readable formats, which are recognized by their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jumprelu_plugin.formats import dictionary_learning, gemma_scope, gemma_scope_2, saelens
from jumprelu_plugin.formats.dictionary import Dictionary

# The files of the readable formats, by which a dictionary may be named too.
_FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    gemma_scope.FILENAME,
    gemma_scope_2.FILENAME,
    dictionary_learning.FILENAME,
)


def dictionary_folder(source: str | Path) -> Path:
    """The folder of a dictionary, given as the folder itself or as one of its files.

    Raises:
        ValueError: it is a file of another name.
    """
    source = Path(source)
    if not source.is_file():
        return source
    if source.name not in _FILES:
        raise ValueError(
            f"{source} is not a dictionary's file: give the folder of a saved dictionary, or the "
            f"file under its own name, one of {', '.join(_FILES)}"
        )
    return source.parent


def load_dictionary(
    folder: str | Path,
    *,
    fold_scale: bool = False,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
) -> Dictionary:
    """Read the dictionary in a SAELens, Gemma Scope, Gemma Scope 2 or dictionary_learning folder.

    Args:
        folder: the folder, or one of its files, such as Gemma Scope's params.npz.
        fold_scale: fold the input scale of a SAELens checkpoint into its parameters.
        hook_name, hook_name_out, model_name: override the names in the files, or replace missing
            ones.

    Raises:
        ValueError: the folder is in none of these formats, or its files are invalid.
    """
    folder = dictionary_folder(folder)
    if saelens.is_format(folder):
        dictionary = saelens.read(folder, fold_scale=fold_scale)
    elif gemma_scope.is_format(folder):
        dictionary = gemma_scope.read(folder, hook_name=hook_name, hook_name_out=hook_name_out)
    elif gemma_scope_2.is_format(folder):
        dictionary = gemma_scope_2.read(folder, hook_name=hook_name, hook_name_out=hook_name_out)
    elif dictionary_learning.is_format(folder):
        dictionary = dictionary_learning.read(folder, hook_name=hook_name)
    else:
        raise ValueError(
            f"{folder} holds no dictionary: expected cfg.json (SAELens), {gemma_scope.FILENAME} "
            f"(Gemma Scope), {gemma_scope_2.FILENAME} (Gemma Scope 2) or "
            f"{dictionary_learning.FILENAME} (dictionary_learning). For a folder of layer_0, "
            "layer_1, ... or a cross-layer transcoder use --to circuit-tracer"
        )
    names = {"hook_name": hook_name, "hook_name_out": hook_name_out, "model_name": model_name}
    return replace(
        dictionary, **{name: value for name, value in names.items() if value is not None}
    )
