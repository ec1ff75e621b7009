"""The SAEs of a study: saved folders that read one language model and one text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_lens import SAE

from jumprelu_plugin.formats.saved import SavedDictionary
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.models.hooks import sae_sites
from jumprelu_plugin.models.options import ModelChoice, ModelOptions
from jumprelu_plugin.models.trained_on import sae_heads


@dataclass(frozen=True)
class StudySAE:
    """A saved SAE and the name under which a report compares it.

    Attributes:
        label: the group in tables and figures, such as the architecture.
        saved: the SAE, its model and its text.
    """

    label: str
    saved: SavedDictionary

    @property
    def architecture(self) -> str:
        """The architecture that the folder names; SAELens saves a trained batchtopk as jumprelu."""
        return self.saved.dictionary.cfg.architecture()


def load_study_saes(
    folders: Sequence[str | Path],
    options: ModelOptions | None = None,
    *,
    context_size: int | None = None,
) -> list[StudySAE]:
    """Load the SAEs of a study; the language model is loaded once.

    Args:
        folders: SAELens folders, each `folder` or `label=folder`. Without a label it is the
            folder's name, or its path where two folders have one name. Folders that share a label
            are compared as one group.
        options: the model and the text; what is left out is as the first SAE's metadata says.
        context_size: tokens in a sequence, in place of the metadata's.

    Raises:
        ValueError: there is no folder, a folder holds no SAE, the SAEs name different models, or an
            SAE's width is not that of the model at its hook.
        OSError: the model cannot be had.
    """
    options = options or ModelOptions()
    require_device(options.device)
    named = _labels([str(folder) for folder in folders])
    choices = [_choice(folder, options, context_size) for _, folder in named]
    for (_, folder), choice in zip(named, choices, strict=True):
        if choice.model_name != choices[0].model_name:
            raise ValueError(
                f"{folder} reads the model {choice.model_name!r} and {named[0][1]} reads "
                f"{choices[0].model_name!r}: a study compares SAEs of one model. Leave one out, or "
                "name the model of all with --model_name"
            )
    model = choices[0].load()
    found = []
    for label, folder in named:
        sae = SAE.load_from_disk(folder, options.device)
        hook, _ = sae_sites(sae)
        if hook not in model.hook_dict:
            raise ValueError(f"{folder} reads {hook!r}, which {choices[0].model_name!r} lacks")
        head, _ = sae_heads(sae)
        width = hook_widths(model, [hook], None if head is None else {hook: head})[hook]
        if width != sae.cfg.d_in:
            raise ValueError(
                f"{folder} takes activations of width {sae.cfg.d_in}, and {hook!r} of the model "
                f"{choices[0].model_name!r} has width {width}: the SAE is of another model"
            )
        found.append(StudySAE(label, SavedDictionary(folder, sae, model, choices[0])))
    return found


def _labels(folders: Sequence[str]) -> list[tuple[str, Path]]:
    if not folders:
        raise ValueError("no SAE was given: give the folders of one or several")
    pairs = [folder.partition("=")[::2] if "=" in folder else ("", folder) for folder in folders]
    names = [Path(folder).name for label, folder in pairs if not label]
    return [
        (label or (folder if names.count(Path(folder).name) > 1 else Path(folder).name),
         Path(folder))
        for label, folder in pairs
    ]  # fmt: skip


def _choice(folder: Path, options: ModelOptions, context_size: int | None) -> ModelChoice:
    config = folder / "cfg.json"
    if not config.is_file():
        raise ValueError(f"{folder} holds no SAE: there is no cfg.json in it")
    try:
        metadata = json.loads(config.read_text(encoding="utf-8")).get("metadata") or {}
    except ValueError as error:
        raise ValueError(f"{config} is not whole: {error}") from None
    choice = options.resolve(metadata, folder)
    return choice if context_size is None else replace(choice, context_size=context_size)
