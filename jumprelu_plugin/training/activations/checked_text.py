"""Refuses text that SAELens' activation store reads without end, or that the model cannot read."""

from __future__ import annotations

import reprlib
from collections.abc import Generator
from typing import Any

import torch
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.models.sequences import require_row

MAX_EMPTY_BATCHES = 100


class CheckedText(ActivationsStore):
    """An activation store that ends where there is no text to read.

    Raises:
        ValueError: on a batch, if the text does not fill one sequence, a hundred batches in a row
            hold no token that is kept, a row of tokenized text is short or of another model, or
            another row holds no text.
    """

    order: str = ""  # how the text's rows have been shuffled, for a message
    _empty_batches = 0

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        tokenized = self.is_dataset_tokenized
        require = self._require_tokens if tokenized else self._require_text
        what = "the tokenized text" if tokenized else "the text"
        for number, row in enumerate(super()._iterate_raw_dataset()):
            require(row, f"row {number} of {what}{self.order}")
            yield row

    def _require_tokens(self, row: Any, name: str) -> None:
        tokens = torch.as_tensor(row[: self.context_size], dtype=torch.long)
        require_row(tokens, name, self.context_size, self.model)

    def _require_text(self, row: Any, name: str) -> None:
        # With a chat template a row may be a conversation.
        if not isinstance(row, str) and not getattr(self, "use_chat_formatting", False):
            raise ValueError(
                f"{name} holds {reprlib.repr(row)} in its column {self.tokens_column!r}, and no "
                "text: drop such rows (dataset.filter), or give another dataset"
            )

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        empty = True
        for sequence in super()._iterate_tokenized_sequences():
            empty = False
            yield sequence
        if empty:
            raise ValueError(
                f"too little text: the dataset's {self.n_dataset_processed} documents do not fill "
                f"one sequence of context_size {self.context_size}; give more text or a smaller "
                "context_size"
            )

    def require_tokens(self, kept: int) -> None:
        """Count a batch of text, of which so many tokens are kept.

        Raises:
            ValueError: it and those before it had none.
        """
        self._empty_batches = 0 if kept else self._empty_batches + 1
        if self._empty_batches == MAX_EMPTY_BATCHES:
            raise ValueError(
                f"{self._empty_batches} batches of text in a row held special tokens alone, which "
                "exclude_special_tokens drops: give more text, or another dataset"
            )
