"""What an activation cache says of itself: its model, text, hooks, and which shards it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jumprelu_plugin.records import read_json, write_json
from jumprelu_plugin.training.activations.cache.coding import DTYPES, bytes_of_row

MANIFEST_FILENAME = "activations.json"
FORMAT = "jumprelu-plugin activation cache 1"


@dataclass(frozen=True)
class CacheManifest:
    """The description of an activation cache, saved as `activations.json`.

    Attributes:
        model_name, model_class_name: as `load_model` takes them.
        model_digest: `language_models.model_digest` of the weights.
        dataset_path: the text; empty for the text of the `demo` extra.
        text_digest: digest of the token sequences.
        n_sequences, context_size: their number, and tokens in each.
        prepend_bos: whether every sequence starts with BOS.
        excluded_tokens: ids of tokens whose activations are left out.
        hooks: width of the activations at every hook, heads flattened.
        dtype: float32, bfloat16 or int8.
        seed: of the order in which sequences are put into shards.
        sequences_per_shard: the last shard may hold fewer.
        shard_rows: rows of every shard, known before the model runs.
        provenance: see `records.provenance`.
    """

    model_name: str
    model_class_name: str
    model_digest: str
    dataset_path: str
    text_digest: str
    n_sequences: int
    context_size: int
    prepend_bos: bool
    excluded_tokens: tuple[int, ...]
    hooks: Mapping[str, int]
    dtype: str
    seed: int
    sequences_per_shard: int
    shard_rows: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def n_rows(self) -> int:
        """Tokens whose activations are kept."""
        return sum(self.shard_rows)

    @property
    def shard_bytes(self) -> tuple[int, ...]:
        """Bytes of the activations of every shard."""
        row = sum(bytes_of_row(width, self.dtype) for width in self.hooks.values())
        return tuple(row * rows for rows in self.shard_rows)

    @property
    def n_bytes(self) -> int:
        """Bytes of the activations of all shards."""
        return sum(self.shard_bytes)

    def shard(self, folder: Path, number: int) -> Path:
        """The file of a shard."""
        return folder / f"shard_{number:05d}.safetensors"

    def missing(self, folder: Path) -> list[int]:
        """The numbers of the shards that are not written yet."""
        return [i for i in range(len(self.shard_rows)) if not self.shard(folder, i).exists()]

    def differences(self, other: CacheManifest) -> list[str]:
        """The fields in which two caches differ, as `name: this, not other`."""
        return [
            f"{field.name}: {_short(mine)}, not {_short(theirs)}"
            for field in dataclasses.fields(self)
            if field.compare
            and (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        ]

    def save(self, folder: Path) -> None:
        """Write the manifest into the cache's folder."""
        write_json(folder / MANIFEST_FILENAME, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> CacheManifest:
        """Read the manifest of a cache.

        Raises:
            ValueError: the folder is not an activation cache, or of another version.
        """
        path = folder / MANIFEST_FILENAME
        if not path.is_file():
            raise ValueError(
                f"{folder} is not an activation cache (it has no {MANIFEST_FILENAME}); "
                "write one with jumprelu cache-activations"
            )
        values = read_json(path)
        wrong = [name for name, is_valid in _VALID.items() if not is_valid(values.get(name))]
        if wrong or set(values) != set(_VALID):
            raise ValueError(
                f"{path} is not the manifest of a {FORMAT!r}"
                f"{f' ({wrong[0]} is {_short(values.get(wrong[0]))})' if wrong else ''}; "
                "write the cache again"
            )
        del values["format"]
        values["excluded_tokens"] = tuple(values["excluded_tokens"])
        values["shard_rows"] = tuple(values["shard_rows"])
        return cls(**values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_widths(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(width) and width for width in value.values())


# What each entry of `activations.json` must be.
_VALID: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value == FORMAT,
    "model_name": _is_text,
    "model_class_name": _is_text,
    "model_digest": _is_text,
    "dataset_path": _is_text,
    "text_digest": _is_text,
    "n_sequences": _is_count,
    "context_size": _is_count,
    "prepend_bos": lambda value: isinstance(value, bool),
    "excluded_tokens": _are_counts,
    "hooks": _are_widths,
    "dtype": lambda value: _is_text(value) and value in DTYPES,
    "seed": lambda value: type(value) is int,
    "sequences_per_shard": _is_count,
    "shard_rows": lambda value: _are_counts(value) and value != [],
    "provenance": lambda value: isinstance(value, dict),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
