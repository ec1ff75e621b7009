"""Loads a saved dictionary with the model and the text that its metadata names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from jumprelu_plugin.evaluation import Evaluation, SplicedSet, evaluate
from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import ModelChoice, ModelOptions
from jumprelu_plugin.models.sequences import read_sequences
from jumprelu_plugin.records import digest, provenance
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder, evaluate_clt, load_clt
from jumprelu_plugin.transcoders.clt import folder as clt_folder


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
            context_size=self.choice.context_size,
            held_out=held_out,
            train=train,
            prepend_bos=self.choice.prepend_bos,
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

        Raises as `evaluation.evaluate` and `evaluate_clt` do.
        """
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

    Args:
        options: the model and the text; what is left out is as the dictionary's metadata says.
        context_size: tokens in a sequence, in place of the metadata's.
        clt: whether a cross-layer transcoder will do too.

    Raises:
        ValueError: the device is not there, the folder holds no dictionary, nothing names its
            model, and as `language_models.load_model` does.
        OSError: the model cannot be had.
    """
    folder, options = Path(folder), options or ModelOptions()
    require_device(options.device)
    if clt and clt_folder.is_here(folder):
        dictionary: Any = load_clt(folder, options.device)
        metadata: Mapping[str, Any] = {"model_name": dictionary.cfg.model_name}
    else:
        if not Path(folder, "cfg.json").is_file():
            raise ValueError(f"{folder} holds no SAE: there is no cfg.json in it")
        dictionary = SAE.load_from_disk(folder, options.device)
        metadata = dictionary.cfg.metadata.to_dict()
    choice = options.resolve(metadata, folder)
    if context_size is not None:
        choice = replace(choice, context_size=context_size)
    return SavedDictionary(folder, dictionary, choice.load(), choice)
