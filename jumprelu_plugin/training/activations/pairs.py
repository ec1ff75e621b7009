"""Inputs and targets of transcoders from one forward pass, in an order that can be resumed.

`PairStore` is SAELens' `ActivationsStore`, which reads text and runs the model with a set of hooks,
with another way of shuffling. SAELens mixes new activations into a buffer that it cannot save, so a
resumed run sees other data. Here the text's rows are shuffled first, activations are read in
chunks, and each chunk is shuffled by a generator seeded with its number. Two integers identify any
batch, and a resumed run equals the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.saes.tensor_files import explained, read_safetensors
from jumprelu_plugin.step import spinning
from jumprelu_plugin.training.activations.checked_text import CheckedText
from jumprelu_plugin.training.activations.multi_hook import for_hooks


@dataclass(frozen=True)
class HookPair:
    """The hook a transcoder reads and the hook whose activations it reconstructs."""

    hook_in: str
    hook_out: str


class PairStore(CheckedText):
    """An endless stream of rows [x ‖ y] for one or several pairs of hooks.

    `next(store)` gives the rows of the only pair, [train_batch_size_tokens, d_in + d_out];
    `get_multi_hook_data_loader()` gives a dict from each pair's name to its rows, all of the same
    tokens. `n_batches_in_buffer` sequences are read and shuffled together, in memory
    `chunk_bytes`. A chunk's tokens that do not fill a batch are not served.
    """

    pairs: dict[str, HookPair]
    seed: int

    @classmethod
    def like(
        cls,
        store: ActivationsStore,
        pairs: Mapping[str, HookPair],
        widths: Mapping[str, int],
        seed: int,
    ) -> PairStore:
        """Read what `store` reads: same model, text, sizes and excluded tokens.

        Args:
            pairs: by name.
            widths: of the activations at every hook of the pairs.
            seed: of the order of the data.

        Raises:
            ValueError: `store` reads cached activations, which hold one hook.
        """
        if store.dataset is None or store.cached_activation_dataset is not None:
            raise ValueError(
                "cached activations hold one hook, and a transcoder reads two: train with "
                "use_cached_activations=False"
            )
        dataset, order = store.dataset, ""
        if isinstance(dataset, Dataset):
            dataset, order = dataset.shuffle(seed=seed), f", ordered as by shuffle(seed={seed}),"
        hooks = list(
            dict.fromkeys(hook for pair in pairs.values() for hook in (pair.hook_in, pair.hook_out))
        )
        # A head is chosen on the input's side alone.
        heads = {
            pair.hook_in: store.hook_head_index
            for pair in pairs.values()
            if pair.hook_in != pair.hook_out
        }
        made = for_hooks(cls, store, dataset, widths, heads, hooks)
        made.pairs, made.seed, made.order = dict(pairs), seed, order
        made._chunk = made._served = made._sequences_read = 0
        return made

    _chunk: int  # which chunk is being served
    _served: int  # batches of it that have been handed out
    _sequences_read: int  # by this object: tells how far the text has to be skipped

    @property
    def chunk_sequences(self) -> int:
        """Sequences in a chunk: n_batches_in_buffer, in whole batches of the model."""
        per_pass = self.store_batch_size_prompts
        return -(-self.n_batches_in_buffer // per_pass) * per_pass

    @property
    def chunk_bytes(self) -> int:
        """Memory a chunk takes."""
        assert self._hook_d_ins is not None
        tokens = self.chunk_sequences * self.training_context_size
        return tokens * sum(self._hook_d_ins.values()) * self.dtype.itemsize

    # ---------------------------------------------------------------- serving

    @override
    def get_data_loader(self) -> Iterator[Float[Tensor, "batch d_in+d_out"]]:
        (name,) = self.pairs
        for rows in self.get_multi_hook_data_loader():
            yield rows[name]

    @override
    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Float[Tensor, "batch d_in+d_out"]]]:
        while True:
            harvest = self._harvest()
            tokens, size = len(next(iter(harvest.values()))), self.train_batch_size_tokens
            if tokens < size:
                raise ValueError(
                    f"{self.chunk_sequences} sequences of {self.training_context_size} tokens give "
                    f"{tokens} activations, fewer than a batch of {size}: raise "
                    "n_batches_in_buffer (sequences shuffled together)"
                )
            generator = torch.Generator().manual_seed(self.seed + self._chunk)
            order = torch.randperm(tokens, generator=generator).to(self.device)
            while self._served < tokens // size:
                batch = order[self._served * size : (self._served + 1) * size]
                self._served += 1
                yield {
                    name: torch.cat(
                        [harvest[pair.hook_in][batch], harvest[pair.hook_out][batch]], 1
                    )
                    for name, pair in self.pairs.items()
                }
            self._chunk, self._served = self._chunk + 1, 0

    def _harvest(self) -> dict[str, Float[Tensor, "tokens width"]]:
        """The activations of a chunk's kept tokens at every hook."""
        assert self._hook_d_ins is not None
        self._skip(self._chunk * self.chunk_sequences - self._sequences_read)
        room = self.chunk_sequences * self.training_context_size
        # Filled in place: joining pieces at the end would take the memory twice.
        found = {
            hook: torch.empty(room, width, dtype=self.dtype, device=self.device)
            for hook, width in self._hook_d_ins.items()
        }
        kept = 0
        for _ in range(self.chunk_sequences // self.store_batch_size_prompts):
            spinning.adapt()
            activations = self._get_filtered_multi_hook_llm_batch()
            count = len(next(iter(activations.values())))
            for hook, values in activations.items():
                found[hook][kept : kept + count] = values
            kept += count
        self._sequences_read += self.chunk_sequences
        return {hook: values[:kept] for hook, values in found.items()}

    @override
    def _get_filtered_multi_hook_llm_batch(
        self, raise_on_epoch_end: bool = False
    ) -> dict[str, Float[Tensor, "tokens width"]]:
        found = super()._get_filtered_multi_hook_llm_batch(raise_on_epoch_end)
        self.require_tokens(len(next(iter(found.values()))))
        return found

    def next_text(self) -> dict[str, Float[Tensor, "tokens width"]]:
        """Every hook's activations of the next batch of text, in the text's order."""
        return self._get_filtered_multi_hook_llm_batch()

    def _skip(self, sequences: int) -> None:
        for _ in range(sequences):
            try:
                next(self.iterable_sequences)
            except StopIteration:
                self.iterable_sequences = self._iterate_tokenized_sequences()
                next(self.iterable_sequences)
        self._sequences_read += max(sequences, 0)

    def first_sequences(self, count: int) -> Int[Tensor, "sequences positions"]:
        """The text's first rows, read apart from the stream: serving goes on where it was."""
        processed = self.n_dataset_processed
        rows = list(islice(self._iterate_tokenized_sequences(), count))
        self.n_dataset_processed = processed
        return torch.stack(rows)

    # ---------------------------------------------------------------- resuming

    @override
    def state_dict(self) -> dict[str, Tensor]:
        place = {"chunk": torch.tensor(self._chunk), "served": torch.tensor(self._served)}
        return {**super().state_dict(), **place}

    @override
    def load(self, file_path: str) -> None:
        """Continue where a checkpoint stood; call before the first batch is taken.

        Raises:
            ValueError: the file is not of a `PairStore`.
        """
        state: dict[str, Any] = read_safetensors(Path(file_path))
        if not {"chunk", "served"} <= state.keys():
            raise ValueError(
                f"{file_path} is the place of another kind of activation store; resume from a "
                "checkpoint of a transcoder"
            )
        with explained(Path(file_path), "resume from an earlier checkpoint"):
            self._chunk, self._served = int(state["chunk"]), int(state["served"])
            if min(self._chunk, self._served) < 0:
                raise ValueError(f"it is at chunk {self._chunk}, batch {self._served}")
