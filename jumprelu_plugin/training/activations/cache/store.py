"""SAELens' activation store with a cache in place of the model's forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor, nn
from typing_extensions import override

from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.saes.tensor_files import read_safetensors
from jumprelu_plugin.training.activations.cache.manifest import CacheManifest
from jumprelu_plugin.training.activations.cache.reader import ActivationCache, CacheBatches
from jumprelu_plugin.training.activations.store import CACHE_POSITION


class CachedActivationsStore(ActivationsStore):
    """A store whose training batches come from an `ActivationCache`.

    Text and model are still there for SAELens' evaluations. A checkpoint holds the position in the
    cache, a single number, from which a resumed run goes on with the same batches. The cache
    decides the order of the data; `n_batches_in_buffer` and `activations_mixing_fraction` have no
    effect.
    """

    cache: ActivationCache
    seed: int = 0

    @override
    def get_data_loader(self) -> CacheBatches:
        return self.cache.batches(self.hook_name, self.train_batch_size_tokens, self.seed)

    @override
    def __next__(self) -> Tensor:
        return super().__next__().to(device=self.device, dtype=self.dtype)

    @override
    def state_dict(self) -> dict[str, Tensor]:
        batches = self._dataloader
        served = batches.served if isinstance(batches, CacheBatches) else 0
        state = {CACHE_POSITION: torch.tensor(served), "random_state": torch.get_rng_state()}
        return {**super().state_dict(), **state}

    @override
    def load(self, file_path: str) -> None:
        """Go on from a checkpoint's position.

        Raises:
            ValueError: the checkpoint is of a run that read no cache.
        """
        state = read_safetensors(Path(file_path))
        if CACHE_POSITION not in state:
            raise ValueError(
                f"{file_path} is of a run that did not read an activation cache; resume it without "
                "--activations"
            )
        batches = self.get_data_loader()
        batches.served = int(state[CACHE_POSITION])
        self._dataloader = batches
        torch.set_rng_state(state["random_state"])


def cached(store: ActivationsStore, cfg: Any, cache: ActivationCache) -> CachedActivationsStore:
    """The same store with its training batches from a cache; the text is not loaded again."""
    made = CachedActivationsStore.from_config(store.model, cfg, override_dataset=store.dataset)
    assert isinstance(made, CachedActivationsStore)
    made.cache, made.seed = cache, cfg.seed
    return made


def open_cache_for(folder: str | Path, cfg: Any) -> ActivationCache:
    """Open a cache and check that it is what a run's config describes.

    Raises:
        ValueError: no complete cache, or one of another model, text or hook; the message names
            every difference.
    """
    cache = ActivationCache(folder)
    manifest = cache.manifest
    width = cache.width(cfg.hook_name)
    wanted = {
        "model_name": (cfg.model_name, manifest.model_name),
        "dataset_path": (cfg.dataset_path, manifest.dataset_path),
        "context_size": (cfg.context_size, manifest.context_size),
        "prepend_bos": (cfg.prepend_bos, manifest.prepend_bos),
        "exclude_special_tokens": _exclusion(cfg, manifest),
        "d_in": (cfg.sae.d_in, width),
        "hook_head_index": (cfg.hook_head_index, None),
        "seqpos_slice": (_positions(cfg), (None,)),
        # A cache is written with SAELens' defaults of these.
        "disable_concat_sequences": (cfg.disable_concat_sequences, False),
        "sequence_separator_token": (cfg.sequence_separator_token, "bos"),
        "autocast_lm": (cfg.autocast_lm, False),
    }
    different = [
        f"{name} is {there!r} in the cache and {asked!r} in the run"
        for name, (asked, there) in wanted.items()
        if asked != there
    ]
    if different:
        raise ValueError(
            f"the activation cache {folder} is not of this run: {'; '.join(different)}. Give the "
            "run the cache's values, or write another cache"
        )
    return cache


def _positions(cfg: Any) -> tuple[int | None, ...]:
    """The run's `seqpos_slice`; SAELens' default where it is another way to say all of them."""
    asked, every = tuple(cfg.seqpos_slice), range(cfg.context_size)
    return (None,) if every[slice(*asked)] == every else asked


def _exclusion(cfg: Any, manifest: CacheManifest) -> tuple[Any, Any]:
    """What a run asks to leave out, and what the cache does; in ids where the run names ids."""
    asked, left_out = cfg.exclude_special_tokens, sorted(manifest.excluded_tokens)
    if isinstance(asked, bool):
        return asked, bool(left_out)
    return sorted(asked), left_out


def require_same_model(cache: ActivationCache, model: nn.Module) -> None:
    """Raise ValueError if a cache is of other weights than a model's."""
    found, wanted = model_digest(model), cache.manifest.model_digest
    if found != wanted:
        raise ValueError(
            f"the activation cache {cache.folder} is of another model: its weights have the digest "
            f"{wanted}, this model's have {found} (another class or dtype has another digest; the "
            f"cache was written with model_class_name {cache.manifest.model_class_name}). Train "
            "with the model it was written with, or write another cache"
        )
