"""The SAEs of a study: saved folders that read one language model and one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_lens import logger

from jumprelu_plugin.formats.saved import SavedDictionary, load_saved_sae
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.models.hooks import sae_sites
from jumprelu_plugin.models.options import ModelChoice, ModelOptions
from jumprelu_plugin.models.sequences import DEFAULT_CONTEXT_SIZE
from jumprelu_plugin.models.trained_on import sae_heads

# What decides the text of a study: by an option for all SAEs, or by metadata alone.
_BY_OPTION = ("dataset_path", "context_size")
_BY_METADATA = ("prepend_bos", "sequence_separator_token", "disable_concat_sequences")


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

    Where the SAEs were trained on text with and without BOS, or with documents joined in different
    ways, a warning says so, and the first SAE's metadata decides.

    Args:
        folders: of any readable format, each `folder` or `label=folder`; a path that exists is a
            folder, also with a = in it. Without a label it is the folder's name, or its path where
            two folders have one name. Folders that share a label are compared as one group.
        options: the model and the text; what is left out is as the SAEs' metadata says.
        context_size: tokens in a sequence, in place of the metadata's.

    Raises:
        ValueError: there is no folder, a folder holds no SAE, the SAEs name different models or
            other ways to load one, another text or context size, or an SAE's width is not that of
            the model at its hook.
        OSError: the model cannot be had.
    """
    options = options or ModelOptions()
    require_device(options.device)
    named = _labels([str(folder) for folder in folders])
    saes = [load_saved_sae(folder, options) for _, folder in named]
    choices = [
        options.resolve(sae.cfg.metadata.to_dict(), folder)
        for sae, (_, folder) in zip(saes, named, strict=True)
    ]
    for (_, folder), choice in zip(named, choices, strict=True):
        _require_same_model(folder, choice, named[0][1], choices[0])
        for difference in choice.differences:
            logger.warning(f"{folder}: {difference}, with which the dictionary was trained")
    if context_size is not None:
        choices = [replace(choice, context_size=context_size) for choice in choices]
    _require_same_text([folder for _, folder in named], choices)
    model = choices[0].load()
    found = []
    for sae, (label, folder) in zip(saes, named, strict=True):
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
    pairs = [
        folder.partition("=")[::2] if "=" in folder and not Path(folder).exists() else ("", folder)
        for folder in folders
    ]
    names = [Path(folder).name for label, folder in pairs if not label]
    return [
        (label or (folder if names.count(Path(folder).name) > 1 else Path(folder).name),
         Path(folder))
        for label, folder in pairs
    ]  # fmt: skip


def _require_same_model(
    folder: Path, choice: ModelChoice, first_folder: Path, first: ModelChoice
) -> None:
    for name in ("model_name", "model_class_name", "from_pretrained_kwargs", "dtype"):
        found, wanted = getattr(choice, name), getattr(first, name)
        if found != wanted:
            option = name.replace("from_pretrained", "model_from_pretrained")
            raise ValueError(
                f"{folder} reads a model with {option} {found!r} and {first_folder} one with "
                f"{wanted!r}: a study compares SAEs of one model. Leave one out, or say it for all "
                f"with --{option}"
            )


def _require_same_text(folders: Sequence[Path], choices: Sequence[ModelChoice]) -> None:
    """Refuse what the study's options can decide, and warn of what they cannot."""
    where = "the SAEs were trained on text of different kinds: "
    different = _differences(_BY_OPTION, folders, choices)
    if different:
        flags = " and ".join(f"--{name}" for name in different)
        raise ValueError(
            f"{where}{'; '.join(different.values())}. A study reads one text with all of them: "
            f"leave some out, or say for all with {flags}"
        )
    # How documents are joined matters in a dataset; those of the demo extra are joined in one way.
    names = _BY_METADATA if choices[0].dataset_path else _BY_METADATA[:1]
    different = _differences(names, folders, choices)
    if different:
        logger.warning(f"{where}{'; '.join(different.values())}. All are read as {folders[0]} was")


def _differences(
    names: Sequence[str], folders: Sequence[Path], choices: Sequence[ModelChoice]
) -> dict[str, str]:
    """What is not the same for all: by name, a phrase with each value and the folders that it has.

    An SAE that records no context size is read at the default one.
    """
    found: dict[str, str] = {}
    for name in names:
        by_value: dict[str, list[str]] = {}
        for folder, choice in zip(folders, choices, strict=True):
            value = getattr(choice, name)
            if name == "context_size":
                value = value or DEFAULT_CONTEXT_SIZE
            by_value.setdefault(repr(value), []).append(str(folder))
        if len(by_value) > 1:
            phrases = [f"{value} for {', '.join(own)}" for value, own in by_value.items()]
            found[name] = f"{name} is {' and '.join(phrases)}"
    return found
