"""Refuses text that gives no activations, which SAELens' activation store reads without end."""

from __future__ import annotations

from collections.abc import Generator

from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

MAX_EMPTY_BATCHES = 100


class CheckedText(ActivationsStore):
    """An activation store that ends where there is no text to read.

    Raises:
        ValueError: on a batch, if the text does not fill one sequence, or a hundred batches in a
            row hold no token that is kept.
    """

    _empty_batches = 0

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
