"""The hooked model and the texts that `train-transcoders` and `train-clt` read."""

from __future__ import annotations

from typing import Any

from datasets import load_dataset
from jaxtyping import Int
from torch import Tensor

from jumprelu_plugin.models.options import named_model
from jumprelu_plugin.models.sequences import fitting_context, read_sequences
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.training.runner import refuse_empty_text
from jumprelu_plugin.training.text_source import local_dataset
from jumprelu_plugin.transcoders.settings import LayerRunSettings


def model_of(settings: LayerRunSettings, model: Any = None) -> Any:
    """The model given, or the one that the settings name.

    Raises:
        ValueError: it does not exist, or its context is shorter than `settings.context_size`.
    """
    if model is None:
        model = named_model(settings)
    fitting_context(model, settings.context_size)
    return model


def texts_of(
    model: Any, settings: LayerRunSettings, dataset: Any = None
) -> tuple[Any, Int[Tensor, "sequences context"] | None]:
    """The text to train on, and text held out.

    Only the packaged texts have a held-out split: with a text of the user's there is none.

    Raises:
        ValueError: the text is empty, or its folder does not exist.
        OSError: the hub has no such text, or cannot be reached.
    """
    if dataset is not None:
        return dataset, None
    if settings.dataset_path:
        dataset = local_dataset(settings.dataset_path, streaming=True)
        if dataset is None:
            dataset = load_dataset(settings.dataset_path, split="train", streaming=True)
        refuse_empty_text(dataset)
        return dataset, None
    dataset = tokenized_dataset(model.tokenizer, settings.context_size, "train")
    if settings.evaluation_sequences <= 0:
        return dataset, None
    _, held_out = read_sequences(
        model, context_size=settings.context_size, held_out=settings.evaluation_sequences
    )
    return dataset, held_out
