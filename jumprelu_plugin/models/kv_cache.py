"""The number of positions of a sequence that are in the KV cache when a forward pass starts.

The name of a block's cache argument depends on the family: `past_key_values` (Llama, Mistral,
Qwen2, OPT, Gemma), `layer_past` (GPT-NeoX, GPT-J, GPT-Neo, BLOOM, Falcon, CodeGen, MPT),
`past_kv_cache_entry` (HookedTransformer), or none (GPT-2, where it is positional). A cache is
therefore recognized by its methods. An argument named like a cache without them is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

# Arguments with "cache" in their name that hold none: a flag, and the positions of the tokens.
_NO_CACHE = ("use_cache", "cache_position")


@contextmanager
def cache_length_tracked(model: Any, set_length: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call `set_length` in each forward pass, before the first block runs.

    Args:
        model: a HookedTransformer or a bridge, with `blocks`.
        set_length: takes the number of positions in the KV cache, 0 without a cache.

    Raises:
        ValueError: in a forward pass, if the length of a cache cannot be read, as for the state of
            a Mamba.
    """

    def at_model(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        set_length(_cached_positions(_named(module, args, kwargs)) or 0)

    def at_first_block(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        length = _cached_positions(_named(module, args, kwargs))
        if length is not None:
            set_length(length)

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        set_length(0)

    # The model's hook is for families whose blocks do not receive the cache, the first block's for
    # HookedTransformer.generate, which calls `forward` and so does not run the model's hooks.
    whole = getattr(model, "original_model", model)
    with ExitStack() as stack:
        for handle in (
            whole.register_forward_pre_hook(at_model, with_kwargs=True),
            model.blocks[0].register_forward_pre_hook(at_first_block, with_kwargs=True),
            whole.register_forward_hook(after_model, always_call=True),
        ):
            stack.callback(handle.remove)
        set_length(0)
        yield


def _named(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; positional ones are named by the signature."""
    called = getattr(module, "original_component", None) or module
    parameters = inspect.signature(called.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cached_positions(arguments: Mapping[str, Any]) -> int | None:
    """The number of positions in the cache among a call's arguments; None if it has no cache."""
    lengths = []
    for name, value in arguments.items():
        named_like_one = ("past" in name or "cache" in name) and name not in _NO_CACHE
        if value is None or not (named_like_one or hasattr(value, "get_seq_length")):
            continue
        length = _length(value)
        if length is None:
            raise ValueError(
                f"The model runs with a cache ({name}, {type(value).__name__}) whose"
                " length cannot be read, so absolute positions are not known. Generate"
                " without a cache (use_past_kv_cache=False, or use_cache=False in transformers),"
                " or use positions=None or 'last'."
            )
        lengths.append(length)
    return max(lengths, default=None)


def _length(cache: Any) -> int | None:
    entry = cache[0] if hasattr(cache, "entries") else cache  # TransformerLens: one a layer
    keys = getattr(entry, "past_keys", None)
    if isinstance(keys, Tensor):
        return keys.shape[1]
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        return int(cache.get_seq_length())
    except (ValueError, NotImplementedError, TypeError):
        return None
