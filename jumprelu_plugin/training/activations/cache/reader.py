"""Reads an activation cache: batches in a seeded order that any position identifies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from jumprelu_plugin.records import require_file
from jumprelu_plugin.saes.tensor_files import explained, read_safetensors
from jumprelu_plugin.training.activations.cache.coding import Standardization, decode_rows
from jumprelu_plugin.training.activations.cache.manifest import CacheManifest

STANDARDIZATION_FILENAME = "standardization.safetensors"
_Shard = tuple[Tensor, Tensor | None]


class ActivationCache:
    """A complete activation cache, opened for reading.

    Attributes:
        folder: where it is.
        manifest: what it holds.

    Raises:
        ValueError: the folder is no activation cache, or one that is not complete.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = CacheManifest.load(self.folder)
        missing = self.manifest.missing(self.folder)
        if missing:
            total = len(self.manifest.shard_rows)
            raise ValueError(
                f"the activation cache {folder} is not complete: {len(missing)} of {total} shards "
                "are missing. Call what wrote it again; it goes on where it stopped"
            )

    @property
    def n_rows(self) -> int:
        """Tokens in the cache."""
        return self.manifest.n_rows

    def width(self, hook: str) -> int:
        """Width of the activations at a hook.

        Raises:
            ValueError: the cache has no such hook.
        """
        if hook not in self.manifest.hooks:
            raise ValueError(
                f"the activation cache {self.folder} holds no activations of {hook!r}; it holds "
                f"{', '.join(self.manifest.hooks)}"
            )
        return self.manifest.hooks[hook]

    def mean(self, hook: str) -> Float[Tensor, " d"]:
        """The mean over all tokens, from the activations before they were rounded."""
        self.width(hook)
        total = sum(
            self._read(number, f"{hook}/sum", self.width(hook))
            for number in range(len(self.manifest.shard_rows))
        )
        assert isinstance(total, Tensor)
        return (total / self.n_rows).float()

    def shard(self, hook: str, number: int) -> _Shard:
        """The stored values of a shard, and their scales; in memory."""
        rows, is_scaled = self.manifest.shard_rows[number], self.manifest.dtype == "int8"
        scale = self._read(number, f"{hook}/scale", rows) if is_scaled else None
        return self._read(number, f"{hook}/values", rows, self.width(hook)), scale

    def standardization(self, hook: str) -> Standardization | None:
        """What int8 values are decoded with."""
        if self.manifest.dtype != "int8":
            return None
        path = self.folder / STANDARDIZATION_FILENAME
        saved = read_safetensors(path)
        center, spread = (
            _of_shape(saved.get(f"{hook}/{part}"), (self.width(hook),), f"{hook}/{part}", path)
            for part in ("center", "spread")
        )
        return Standardization(center, spread)

    def rows(self, hook: str) -> Iterator[Float[Tensor, "rows d"]]:
        """All activations at a hook, a shard at a time, as they are stored."""
        self.width(hook)
        standard = self.standardization(hook)
        for number in range(len(self.manifest.shard_rows)):
            yield decode_rows(*self.shard(hook, number), standard)

    def batches(self, hook: str, batch_size: int, seed: int = 0) -> CacheBatches:
        """Endless batches of a hook's activations in float32.

        Raises:
            ValueError: the cache has no such hook, or fewer tokens than a batch.
        """
        return CacheBatches(self, hook, batch_size, seed)

    def _read(self, number: int, name: str, *shape: int) -> Tensor:
        path = self.manifest.shard(self.folder, number)
        require_file(path)
        with explained(path), safe_open(path, framework="pt") as file:
            # A copy: the mapped file is then read once and in order, not in the rows' random order.
            return _of_shape(file.get_tensor(name), shape, name, path).clone()


def _of_shape(found: Tensor | None, shape: tuple[int, ...], name: str, path: Path) -> Tensor:
    """The tensor `name` of a file, refused where the manifest describes another."""
    if found is None or found.shape != shape:
        raise ValueError(
            f"{path} has {name} of shape {None if found is None else tuple(found.shape)}; the "
            f"cache's manifest says {shape}. Delete the file and write the cache again"
        )
    return found


class CacheBatches(Iterator[Tensor]):
    """Endless batches from a cache; set `served` to go on from any position.

    In every pass over the cache, its shards come in another order, and the rows of a shard too. The
    order depends on the seed alone. The next shard is read in the background while one is served.

    Attributes:
        served: rows that have been handed out since the start.
    """

    def __init__(self, cache: ActivationCache, hook: str, batch_size: int, seed: int):
        cache.width(hook)
        if batch_size > cache.n_rows:
            raise ValueError(
                f"a batch has {batch_size} tokens and the activation cache {cache.folder} has "
                f"{cache.n_rows}: give a smaller batch, or cache more text"
            )
        self.cache, self.hook, self.batch_size, self.seed = cache, hook, batch_size, seed
        self.served = 0
        self._standard = cache.standardization(hook)
        self._reading: dict[int, Future[_Shard]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="activation-cache")
        self._current: tuple[tuple[int, int], _Shard, Tensor] | None = None

    def __next__(self) -> Float[Tensor, "batch d"]:
        parts: list[Tensor] = []
        wanted = self.batch_size
        while wanted:
            part = self._take(wanted)
            parts.append(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _take(self, most: int) -> Tensor:
        """Up to so many rows, from one shard."""
        epoch, place = divmod(self.served, self.cache.n_rows)
        shards = self._order(epoch)
        sizes = [self.cache.manifest.shard_rows[number] for number in shards]
        ends = np.cumsum(sizes)
        index = int(np.searchsorted(ends, place, side="right"))
        (values, scale), order = self._load(epoch, shards[index])
        following = shards[index + 1] if index + 1 < len(shards) else self._order(epoch + 1)[0]
        if following != shards[index]:
            self._read_ahead(following)
        start = place - int(ends[index] - sizes[index])
        chosen = order[start : start + most]
        self.served += len(chosen)
        return decode_rows(values[chosen], None if scale is None else scale[chosen], self._standard)

    def _order(self, epoch: int) -> list[int]:
        return _permutation(len(self.cache.manifest.shard_rows), self.seed, epoch).tolist()

    def _load(self, epoch: int, number: int) -> tuple[_Shard, Tensor]:
        if self._current is None or self._current[0] != (epoch, number):
            self._current = None  # at most this shard and the one that is being read are in memory
            self._read_ahead(number)
            shard = self._reading.pop(number).result()
            order = _permutation(len(shard[0]), self.seed, epoch, number)
            self._current = (epoch, number), shard, order
        return self._current[1], self._current[2]

    def _read_ahead(self, number: int) -> None:
        if number not in self._reading:
            self._reading = {number: self._reader.submit(self.cache.shard, self.hook, number)}

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def _permutation(count: int, *seed: int) -> Tensor:
    words: Any = np.random.SeedSequence(seed).generate_state(2, np.uint32)
    number = int(words[0]) << 31 | int(words[1]) >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(number))
