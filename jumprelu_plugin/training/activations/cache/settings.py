"""An activation cache from the names of a model, a text and hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.models.options import named_model
from jumprelu_plugin.models.sequences import read_sequences
from jumprelu_plugin.saes.validation import require_at_least
from jumprelu_plugin.training.activations.cache.manifest import CacheManifest
from jumprelu_plugin.training.activations.cache.writer import write_activation_cache

# The least of each number.
_LEAST = {
    "training_tokens": 1,
    "context_size": 2,
    "sequences_per_shard": 1,
    "store_batch_size_prompts": 1,
}


@dataclass(frozen=True)
class CacheSettings:
    """The model and the text of an activation cache, and how it is stored.

    Attributes:
        model_name: tiny-gemma-2, a model folder, or a hub name.
        model_class_name: HookedTransformer, HookedSAETransformer, TransformerBridge or
            SAETransformerBridge.
        model_from_pretrained_kwargs: keyword arguments of the model's loader, as JSON, such as
            {"use_hook_mlp_in": true}.
        dataset_path: a text or pretokenized dataset, on the hub or in a folder. Default: the
            training text of the `demo` extra.
        training_tokens: tokens to read, at most; special tokens count here and are not kept.
        context_size: tokens in a sequence.
        cache_dtype: of the stored activations; int8 takes a quarter of float32's bytes.
        exclude_special_tokens: leave out activations at BOS, EOS, PAD and the like.
        sequences_per_shard: sequences whose tokens are shuffled together and read into memory.
        store_batch_size_prompts: sequences in a forward pass.
        device: of the model.
        dtype: of the model's weights.
        seed: of the order.
    """

    model_name: str = EMBEDDED_MODEL
    model_class_name: str = "HookedSAETransformer"
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    dataset_path: str = ""
    training_tokens: int = 1_000_000
    context_size: int = 128
    cache_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    exclude_special_tokens: bool = True
    sequences_per_shard: int = 512
    store_batch_size_prompts: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def cache_activations(
    output_path: str | Path,
    hook_names: Sequence[str] | str,
    settings: CacheSettings,
    *,
    log: Callable[[str], None] = print,
) -> CacheManifest:
    """Load a model and a text and write the activations at several hooks.

    Raises:
        ValueError, OSError: as `write_activation_cache`, `load_model` and `read_sequences` do.
    """
    require_device(settings.device)
    require_at_least(settings, _LEAST)
    model = named_model(settings)
    tokens, _ = read_sequences(
        model,
        settings.dataset_path,
        context_size=settings.context_size,
        held_out=0,
        train=-(-settings.training_tokens // settings.context_size),
    )
    return write_activation_cache(
        output_path,
        model,
        hook_names if isinstance(hook_names, str) else [name.strip() for name in hook_names],
        tokens,
        model_name=settings.model_name,
        model_class_name=settings.model_class_name,
        dataset_path=settings.dataset_path,
        dtype=settings.cache_dtype,
        exclude_special_tokens=settings.exclude_special_tokens,
        sequences_per_shard=settings.sequences_per_shard,
        batch_size=settings.store_batch_size_prompts,
        seed=settings.seed,
        log=log,
    )
