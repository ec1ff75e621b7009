"""Activations of several hooks from one forward pass, in an order that is saved and restored.

SAELens joins the hooks' activations side by side, mixes the joined rows and takes the batches apart
again, so that every hook's batch holds the same tokens. `MultiHookStore` does the same with a
buffer that can be saved (`store.py`). With one hook it serves the batches of a run of that hook
alone; with several, each hook's batches are those of such a run, from the same random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import dtype_to_str
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.training.activations.store import ResumableActivationsStore

Store = TypeVar("Store", bound=ActivationsStore)


class MultiHookStore(ResumableActivationsStore):
    """SAELens' store of several hooks' activations, made resumable.

    `next(store)` gives rows of all hooks, side by side in the order of `from_config_multi_hook`;
    `get_multi_hook_data_loader()` a dict from each hook's name to its columns. Both move on one
    stream. A checkpoint holds the mixing buffer, whose rows are as wide as all hooks together.

    Raises:
        ValueError: on a batch, as `ResumableActivationsStore` does.
    """

    @property
    def hook_d_ins(self) -> dict[str, int]:
        """Width of each hook's activations, in the order in which they are joined."""
        assert self._hook_names is not None and self._hook_d_ins is not None
        return {hook: self._hook_d_ins[hook] for hook in self._hook_names}

    @override
    def get_filtered_llm_batch(
        self, raise_on_epoch_end: bool = False
    ) -> Float[Tensor, "rows widths"]:
        found = self._get_filtered_multi_hook_llm_batch(raise_on_epoch_end)
        # As with one hook: whatever the model's dtype, SAELens' store has them in float32.
        parts = [found[hook].to(torch.float32) for hook in self.hook_d_ins]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @override
    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        while True:
            yield self.taken_apart(next(self))

    def taken_apart(
        self, rows: Float[Tensor, "batch widths"]
    ) -> dict[str, Float[Tensor, "batch d_in"]]:
        """Each hook's columns, contiguous."""
        parts = rows.split(list(self.hook_d_ins.values()), dim=1)
        named = zip(self.hook_d_ins, parts, strict=True)
        return {hook: part.contiguous() for hook, part in named}

    @override
    def hooks_of(self, columns: Tensor) -> str:
        bad = self.taken_apart(columns[None])
        return ", ".join(hook for hook, part in bad.items() if part.any())


def for_hooks(
    made: type[Store],
    store: ActivationsStore,
    dataset: Any,
    widths: Mapping[str, int],
    heads: Mapping[str, int | None],
    hooks: Sequence[str] | None = None,
) -> Store:
    """A store of this class for several hooks, which reads as `store` does.

    Args:
        made: the class.
        store: gives model, sizes and excluded tokens.
        dataset: the text.
        widths: of the activations at every hook.
        heads: by hook, the one head that is read there.
        hooks: in which order they are kept. Default: that of `widths`.
    """
    found = made.from_config_multi_hook(
        model=store.model,
        dataset=dataset,
        hook_names=list(widths if hooks is None else hooks),
        hook_d_ins=dict(widths),
        hook_head_indices=dict(heads),
        context_size=store.context_size,
        n_batches_in_buffer=store.n_batches_in_buffer,
        total_training_tokens=store.total_training_tokens,
        store_batch_size_prompts=store.store_batch_size_prompts,
        train_batch_size_tokens=store.train_batch_size_tokens,
        prepend_bos=store.prepend_bos,
        device=store.device,
        dtype=dtype_to_str(store.dtype),
        model_kwargs=store.model_kwargs,
        autocast_lm=store.autocast_lm,
        seqpos_slice=store.seqpos_slice,
        exclude_special_tokens=store.exclude_special_tokens,
        disable_concat_sequences=store.disable_concat_sequences,
        sequence_separator_token=store.sequence_separator_token,
        activations_mixing_fraction=store.activations_mixing_fraction,
        use_chat_formatting=store.use_chat_formatting,
    )
    assert isinstance(found, made)
    return found
