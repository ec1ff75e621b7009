"""Loads a saved dictionary with the model and the text that its metadata names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import logger
from torch import Tensor

from jumprelu_plugin.analysis.output_file import require_place_for_file
from jumprelu_plugin.evaluation import Evaluation, SplicedSet, evaluate
from jumprelu_plugin.formats.reading import dictionary_folder, load_dictionary
from jumprelu_plugin.formats.saelens import load_folded_sae
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.firing import require_firing
from jumprelu_plugin.models.hooks import sae_sites
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import ModelChoice, ModelOptions
from jumprelu_plugin.models.sequences import fitting_context, read_sequences
from jumprelu_plugin.records import provenance
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder, evaluate_clt, load_clt
from jumprelu_plugin.transcoders.clt import folder as clt_folder

RECORD_FILENAME = "evaluation.json"


@dataclass(frozen=True)
class SavedDictionary:
    """A dictionary with its language model.

    Attributes:
        folder: the dictionary's folder.
        dictionary: SAELens' inference object, or a `CrossLayerTranscoder`.
        model: a hooked model.
        choice: the model and the text.
    """

    folder: Path
    dictionary: Any
    model: Any
    choice: ModelChoice

    def sequences(
        self, held_out: int, *, train: int = 0, seed: int | None = None
    ) -> tuple[Int[Tensor, "train context"], Int[Tensor, "held_out context"]]:
        """Tokens to fit on and held-out tokens; see `models.sequences.read_sequences`."""
        return read_sequences(
            self.model,
            self.choice.dataset_path,
            context_size=fitting_context(self.model, self.choice.context_size),
            held_out=held_out,
            train=train,
            prepend_bos=self.choice.prepend_bos,
            sequence_separator_token=self.choice.sequence_separator_token,
            disable_concat_sequences=self.choice.disable_concat_sequences,
            seed=seed,
        )

    def prompt(self, tokens: int = 16) -> str:
        """The start of the first held-out sequence, as text."""
        _, sequences = self.sequences(1)
        return self.model.tokenizer.decode(sequences[0, :tokens], skip_special_tokens=True)

    def evaluate(
        self, sequences: int = 128, output: str | Path | None = None
    ) -> Evaluation | SplicedSet:
        """Evaluate on held-out sequences; a cross-layer transcoder replaces all its MLPs at once.

        Args:
            output: a JSON file to write the result to, with its provenance.

        Raises:
            ValueError: `output` is a folder, and as `evaluation.evaluate` and `evaluate_clt` do.
        """
        if output is not None:
            require_place_for_file(output, RECORD_FILENAME)
        _, tokens = self.sequences(sequences)
        function = evaluate_clt if isinstance(self.dictionary, CrossLayerTranscoder) else evaluate
        result = function(self.model, self.dictionary, tokens)
        if output is not None:
            source = provenance(model_digest=model_digest(self.model), data_digest=digest(tokens))
            result.save(output, source)
        return result


def load_saved(
    folder: str | Path,
    options: ModelOptions | None = None,
    *,
    context_size: int | None = None,
    clt: bool = False,
) -> SavedDictionary:
    """The dictionary in `folder` and its model, both on the options' device.

    What the options change of what the dictionary's metadata records is logged as a warning.

    Args:
        folder: a folder in any format of `load_dictionary`, or one of its files.
        options: the model and the text; what is left out is as the dictionary's metadata says.
        context_size: tokens in a sequence, in place of the metadata's.
        clt: whether a cross-layer transcoder will do too.

    Raises:
        ValueError: the device is not there, the folder holds no dictionary, nothing names its
            model or its hook, the model lacks the hook or the hook does not fire, the context is
            longer than the model takes, and as
            `language_models.load_model` does.
        OSError: the model cannot be had.
    """
    folder, options = Path(folder), options or ModelOptions()
    require_device(options.device)
    if clt and clt_folder.is_here(folder):
        if options.hook_name or options.hook_name_out:
            raise ValueError(
                f"{folder} holds a cross-layer transcoder, which reads and writes hooks of several "
                "layers: leave out --hook_name and --hook_name_out"
            )
        dictionary: Any = load_clt(folder, options.device)
        metadata: Mapping[str, Any] = dictionary.cfg.metadata
        hooks = [hook for pair in dictionary.cfg.pairs for hook in (pair.hook_in, pair.hook_out)]
    else:
        dictionary, metadata = _as_named(folder, options)
        hooks = list(dict.fromkeys(sae_sites(dictionary)))
    choice = options.resolve(metadata, folder)
    if context_size is not None:
        choice = replace(choice, context_size=context_size)
    model = choice.load()
    choice = replace(choice, context_size=fitting_context(model, choice.context_size))
    require_firing(model, *hooks)
    for difference in choice.differences:
        logger.warning(f"{folder}: {difference}, with which the dictionary was trained")
    return SavedDictionary(folder, dictionary, model, choice)


def load_saved_sae(source: Path, options: ModelOptions) -> Any:
    """SAELens' inference object, from any readable format, with the hooks that the options name.

    Raises:
        ValueError: there is no dictionary, or nothing names the hook that it reads.
    """
    return _as_named(source, options)[0]


def _as_named(source: Path, options: ModelOptions) -> tuple[Any, dict[str, Any]]:
    """`load_saved_sae`, and the metadata before the options went in."""
    sae, recorded = _load_sae(source, options)
    metadata = sae.cfg.metadata
    for name in ("hook_name", "hook_name_out"):
        if getattr(options, name) is not None:
            metadata[name] = getattr(options, name)
    if not metadata.hook_name:
        raise ValueError(
            f"the dictionary in {source} does not name the hook that it reads; name it with "
            "--hook_name, for example --hook_name blocks.12.hook_resid_post"
        )
    return sae, recorded


def _load_sae(source: Path, options: ModelOptions) -> tuple[Any, dict[str, Any]]:
    folder = dictionary_folder(source)
    if (folder / "cfg.json").is_file():
        sae = load_folded_sae(folder, options.device)
        return sae, sae.cfg.metadata.to_dict()
    names = ("hook_name", "hook_name_out", "model_name")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    own = None
    with suppress(ValueError):  # files that do not name a hook may need the options
        own = load_dictionary(folder)
    dictionary = load_dictionary(folder, **given) if given or own is None else own
    sae = dictionary.as_sae().to(options.device)
    recorded = {} if own is None else {name: getattr(own, name) for name in names}
    return sae, {**sae.cfg.metadata.to_dict(), **recorded}
