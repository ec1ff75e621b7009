"""Reads a dictionary in any of the readable formats, which are recognized by their files."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from jumprelu_plugin.formats import dictionary_learning, gemma_scope, gemma_scope_2, saelens
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.transcoders.clt import folder as clt_folder

logger = logging.getLogger(__name__)

# The files of the readable formats, by which a dictionary may be named too.
_FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    gemma_scope.FILENAME,
    gemma_scope_2.FILENAME,
    dictionary_learning.FILENAME,
)
_LAYER_FOLDER = re.compile(r"^layer_(\d+)$")


class NoDictionaryError(ValueError):
    """A folder holds no dictionary in a readable format."""


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
        ValueError: the folder is in none of these formats (`NoDictionaryError`), or its files are
            invalid.
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
        raise NoDictionaryError(
            f"{folder} holds no dictionary: expected cfg.json (SAELens), {gemma_scope.FILENAME} "
            f"(Gemma Scope), {gemma_scope_2.FILENAME} (Gemma Scope 2) or "
            f"{dictionary_learning.FILENAME} (dictionary_learning){_what_is_there(folder)}"
        )
    names = {"hook_name": hook_name, "hook_name_out": hook_name_out, "model_name": model_name}
    given = {name: value for name, value in names.items() if value is not None}
    for name, value in given.items():
        recorded = getattr(dictionary, name)
        if recorded and recorded != value:
            logger.warning(f"{folder} records {name} {recorded}; {value} takes its place")
    return replace(dictionary, **given)


def layer_folders(folder: Path) -> dict[int, Path]:
    """The SAELens folders `folder/layer_0`, `folder/layer_1`, ..., by layer."""
    found: dict[int, Path] = {}
    for child in folder.iterdir() if folder.is_dir() else []:
        match = _LAYER_FOLDER.match(child.name)
        if match and saelens.is_format(child):
            found[int(match[1])] = child
    return dict(sorted(found.items()))


def _what_is_there(folder: Path) -> str:
    """What a folder that is no dictionary's holds instead, and what to do; empty if nothing."""
    layers = layer_folders(folder)
    if layers:
        first = next(iter(layers.values()))
        return f". It holds the folders of {len(layers)} layers: give one of them, such as {first}"
    if clt_folder.is_here(folder):
        return (
            ". It holds a cross-layer transcoder, which `jumprelu evaluate` takes and a command "
            "for one dictionary does not"
        )
    return ""
