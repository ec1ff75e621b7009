"""SAELens' activation store, with a position that is saved and restored to the last row.

SAELens saves how many documents it has read. That loses three things: the rows waiting in the
mixing buffer, the random state that shuffles them, and the position inside a long document. A
`ResumableActivationsStore` gives the same batches as SAELens' own store and saves all three, so
that a resumed training equals the uninterrupted one.

A checkpoint grows by the mixing buffer, `n_batches_in_buffer · context_size` rows of `d_in` numbers
(150 MB at 64 · 256 rows of 2,304 in float32). With `save_buffer=False` only the position and the
random state are saved, and the rows that were waiting are skipped.

It can run the model ahead of training (`read_ahead.py`), with the same batches and the same state.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import Self, override

from jumprelu_plugin.saes.tensor_files import explained, read_safetensors
from jumprelu_plugin.step import spinning
from jumprelu_plugin.training.activations.checked_text import CheckedText
from jumprelu_plugin.training.activations.read_ahead import Place, ReadAhead

# In the saved place of a store that reads an activation cache.
CACHE_POSITION = "rows_served"


class MixingBuffer(Iterator[Tensor]):
    """SAELens' `mixing_buffer`, as an object: the same batches from the same random state.

    Args:
        size: rows to gather before any are served.
        batch_size: rows in a batch.
        source: activations as they come from the model, [rows, d_in] each, without end.
        mix_fraction: share of `size` that stays behind to be mixed with what comes next; with 0
            nothing is shuffled.
        gpu: where batches go, if rows wait on the host. They then lie in page-locked memory, from
            which a copy is queued behind the step before it, and the host does not wait for it.

    Raises:
        ValueError: a size smaller than a batch, or a fraction outside [0, 1].
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        source: Iterator[Tensor],
        mix_fraction: float,
        gpu: torch.device | None = None,
    ) -> None:
        if size < batch_size:
            raise ValueError(
                f"the mixing buffer holds {size} rows (n_batches_in_buffer · context_size) and one "
                f"batch takes {batch_size}: raise n_batches_in_buffer"
            )
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"activations_mixing_fraction is {mix_fraction}; expected 0 to 1")
        self.size, self.batch_size, self.mix_fraction = size, batch_size, mix_fraction
        self._source, self._gpu = source, gpu
        self.waiting: Float[Tensor, "rows d_in"] | None = None
        self.serving: Float[Tensor, "rows d_in"] | None = None

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        if self.serving is None or not len(self.serving):
            self._refill()
        assert self.serving is not None
        batch, self.serving = self.serving[: self.batch_size], self.serving[self.batch_size :]
        return batch if self._gpu is None else batch.to(self._gpu, non_blocking=True)

    @torch.no_grad()
    def _refill(self) -> None:
        parts = [] if self.waiting is None else [self.waiting]
        while True:
            parts.append(next(self._source))
            if sum(map(len, parts)) >= self.size:
                break
        rows = torch.cat(parts)
        if self.mix_fraction > 0:
            order = torch.randperm(len(rows)).to(rows.device)
            rows = torch.index_select(rows, 0, order, out=self._room_for(rows))
        elif self._gpu is not None:
            rows = self._room_for(rows).copy_(rows)
        served = max(1, (len(rows) - int(self.size * self.mix_fraction)) // self.batch_size)
        self.serving = rows[: served * self.batch_size]
        self.waiting = rows[served * self.batch_size :]

    def _room_for(self, rows: Tensor) -> Tensor:
        """An empty tensor like `rows`, page-locked where batches go to a GPU from the host."""
        return torch.empty_like(rows, pin_memory=self._gpu is not None)


class ResumableActivationsStore(CheckedText):
    """SAELens' store of one hook's activations, made resumable.

    Build it with SAELens' own `from_config`. `save_to_checkpoint` and `load_from_checkpoint`, which
    SAELens' runner calls, then save and restore the whole state; a checkpoint of SAELens' own store
    is read as SAELens reads it.

    Raises:
        ValueError: on a batch, if the model's activations are NaN or infinite, or if the text gives
            none at all.
    """

    save_buffer: bool = True
    ahead: int = 0  # passes of the model that a thread makes in advance
    gpu: torch.device | None = None  # where batches go, if the mixing buffer is on the host
    _reader: ReadAhead | None = None
    _sequences_read: int = 0  # in this pass over the text

    @override
    def get_data_loader(self) -> MixingBuffer:
        self.stop_reading()
        source: Iterator[Tensor] = self._iterate_filtered_activations()
        if self.ahead:
            source = self._reader = ReadAhead(source, self._place, self.ahead)
        return MixingBuffer(
            self.n_batches_in_buffer * self.training_context_size,
            self.train_batch_size_tokens,
            source,
            self.activations_mixing_fraction,
            self.gpu,
        )

    def feed(self, device: str | torch.device, ahead: int) -> None:
        """From the next data loader on, bring batches from the host to `device`, if it is a GPU,
        while the step before runs, and make `ahead` passes of the model in advance."""
        to, waits_on = torch.device(device), torch.device(self.device)
        self.gpu = to if to.type == "cuda" and waits_on.type == "cpu" else None
        self.ahead = ahead

    def stop_reading(self) -> None:
        """End the thread that reads ahead, where there is one."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def paused(self) -> AbstractContextManager[None]:
        """While it lasts, the thread that reads ahead does not use the model."""
        return nullcontext() if self._reader is None else self._reader.paused()

    def for_evaluation(self) -> Self:
        """A store that reads the same text from its beginning, and moves this one nowhere."""
        made = copy.copy(self)
        made.ahead, made._reader, made._dataloader = 0, None, None
        if made.dataset is not None:
            made.iterable_sequences = made._iterate_tokenized_sequences()
        return made

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        self._sequences_read = 0
        for sequence in super()._iterate_tokenized_sequences():
            self._sequences_read += 1
            yield sequence

    @override
    def _iterate_filtered_activations(self) -> Generator[Tensor, None, None]:
        for activations in super()._iterate_filtered_activations():
            spinning.adapt()
            self.require_tokens(len(activations))
            if not torch.isfinite(activations).all():
                wrong = ~torch.isfinite(activations)
                bad = int(wrong.any(1).sum())
                raise ValueError(
                    f"the activations of {self.hooks_of(wrong.any(0))} hold NaN or infinite "
                    f"values, on {bad} of {len(activations)} tokens; run the model in float32 or "
                    "bfloat16 (float16 overflows), or exclude the tokens that overflow"
                )
            yield activations

    def hooks_of(self, columns: Bool[Tensor, " width"]) -> str:
        """The names of the hooks that some columns of the rows belong to, for a message."""
        return self.hook_name

    @override
    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        state["random_state"] = torch.get_rng_state()
        # What a thread has read ahead, a resumed run reads again.
        reached = None if self._reader is None else self._reader.reached
        state.update(self._place() if reached is None else reached)
        if self.save_buffer and isinstance(self._dataloader, MixingBuffer):
            for name in ("waiting", "serving"):
                rows = getattr(self._dataloader, name)
                if rows is not None:
                    state[name] = rows.clone()  # safetensors refuses two views of one tensor
        return state

    def _place(self) -> Place:
        """How far the text has been read."""
        place = {
            "n_dataset_processed": torch.tensor(self.n_dataset_processed),
            "sequences_read": torch.tensor(self._sequences_read),
        }
        if self.cached_activation_dataset is not None:
            place["current_row"] = torch.tensor(self.current_row_idx)
        return place

    @override
    def load(self, file_path: str) -> None:
        state = read_safetensors(Path(file_path))
        if "random_state" not in state:  # SAELens' own
            return super().load(file_path)
        if CACHE_POSITION in state:
            raise ValueError(
                f"{file_path} is of a run that read an activation cache; resume it with the same "
                "--activations"
            )
        with explained(Path(file_path), "resume from an earlier checkpoint"):
            self._restore(state)

    def _restore(self, state: dict[str, Tensor]) -> None:
        self.stop_reading()
        if self.dataset is not None:
            self._skip_to(int(state["sequences_read"]))
        self.n_dataset_processed = int(state["n_dataset_processed"])
        if "current_row" in state:
            self.current_row_idx = int(state["current_row"])
        buffer = self.get_data_loader()
        for name in ("waiting", "serving"):
            if name in state:
                setattr(buffer, name, state[name].to(self.device))
        self._dataloader = buffer
        torch.set_rng_state(state["random_state"])

    def _skip_to(self, place: int) -> None:
        sequences = self._iterate_tokenized_sequences()
        skipped = sum(1 for _ in islice(sequences, place))
        if skipped != place:
            raise ValueError(
                f"the checkpoint was made {place} sequences into the text, and this text has "
                f"{skipped}: give the dataset and context_size the run started with"
            )
        self.iterable_sequences, self._sequences_read = sequences, place


def resumable(
    store: ActivationsStore, cfg: Any, save_buffer: bool = True
) -> ResumableActivationsStore:
    """The same store as one that can be saved and resumed exactly; the text is not loaded again."""
    made = ResumableActivationsStore.from_config(store.model, cfg, override_dataset=store.dataset)
    assert isinstance(made, ResumableActivationsStore)
    made.save_buffer = save_buffer
    return made
