"""Pairs of hooks a transcoder can be trained and spliced at: found, or refused, before a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from jumprelu_plugin.training.activations.pairs import HookPair


@torch.no_grad()
def pair_widths(model: Any, pairs: Iterable[HookPair], head: int | None = None) -> dict[str, int]:
    """Width of the activations at every hook of the pairs, from one short forward pass.

    Heads are flattened, or `head` alone is taken at the inputs.

    Raises:
        ValueError: a pair's two hooks are one, a hook does not fire, or the output comes before
            the input in the forward pass, where no transcoder could be spliced in.
    """
    pairs = list(pairs)
    hooks = list(dict.fromkeys(hook for pair in pairs for hook in (pair.hook_in, pair.hook_out)))
    device = next(model.parameters()).device
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    cache = model.run_with_cache(tokens, names_filter=hooks, prepend_bos=False)[1]
    order = list(cache.keys())  # as they fired
    for pair in pairs:
        if pair.hook_in == pair.hook_out:
            raise ValueError(
                f"input and output hook are both {pair.hook_in}: that is an SAE; train it with "
                "architecture jumprelu, or give another hook_name_out"
            )
        for hook in (pair.hook_in, pair.hook_out):
            if hook not in order:
                raise ValueError(f"the hook {hook!r} exists but does not fire in a forward pass")
        if order.index(pair.hook_out) < order.index(pair.hook_in):
            raise ValueError(
                f"{pair.hook_out} is computed before {pair.hook_in}: a transcoder's output hook "
                "has to come after its input hook, or it cannot stand in for what lies between"
            )
    inputs = {pair.hook_in for pair in pairs}
    one_head = {hook for hook in inputs if head is not None}
    return {
        hook: cache[hook].shape[-1] if hook in one_head else cache[hook].shape[2:].numel()
        for hook in hooks
    }
