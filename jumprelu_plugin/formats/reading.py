"""Read a dictionary from any of the formats that can be read, told apart by their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jumprelu_plugin.formats import dictionary_learning, gemma_scope, gemma_scope_2, saelens
from jumprelu_plugin.formats.dictionary import Dictionary


def load_dictionary(
    folder: str | Path,
    *,
    fold_scale: bool = False,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    model_name: str | None = None,
) -> Dictionary:
    """The dictionary in a SAELens, Gemma Scope, Gemma Scope 2 or dictionary_learning folder.

    Args:
        fold_scale: fold the input scale that a mid-training SAELens checkpoint keeps beside it.
        hook_name, hook_name_out, model_name: what the files do not say, or say otherwise.

    Raises:
        ValueError: the folder holds none of these, or what it holds is broken.
    """
    folder = Path(folder)
    if saelens.is_here(folder):
        found = saelens.read(folder, fold_scale=fold_scale)
    elif gemma_scope.is_here(folder):
        found = gemma_scope.read(folder, hook_name=hook_name, hook_name_out=hook_name_out)
    elif gemma_scope_2.is_here(folder):
        found = gemma_scope_2.read(folder)
    elif dictionary_learning.is_here(folder):
        found = dictionary_learning.read(folder, hook_name=hook_name)
    else:
        raise ValueError(
            f"{folder} holds no dictionary: expected cfg.json (SAELens), {gemma_scope.FILENAME} "
            f"(Gemma Scope), {gemma_scope_2.FILENAME} (Gemma Scope 2) or "
            f"{dictionary_learning.FILENAME} (dictionary_learning). For a folder of layer_0, "
            "layer_1, ... or a cross-layer transcoder use --to circuit-tracer"
        )
    given = {"hook_name": hook_name, "hook_name_out": hook_name_out, "model_name": model_name}
    return replace(found, **{name: value for name, value in given.items() if value is not None})
