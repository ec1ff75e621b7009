"""Pairs of hooks a transcoder can be trained and spliced at: found, or refused, before a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jumprelu_plugin.models.firing import hook_widths
from jumprelu_plugin.training.activations.pairs import HookPair


def pair_widths(model: Any, pairs: Iterable[HookPair], head: int | None = None) -> dict[str, int]:
    """Width of the activations at every hook of the pairs, by the hook's name.

    Heads are flattened, or `head` alone is taken at the inputs.

    Raises:
        ValueError: a pair's two hooks are one, a hook does not fire, or the output comes before
            the input in the forward pass, where no transcoder could be spliced in.
    """
    pairs = list(pairs)
    for pair in pairs:
        if pair.hook_in == pair.hook_out:
            raise ValueError(
                f"input and output hook are both {pair.hook_in}: that is an SAE; train it with "
                "architecture jumprelu, or give another hook_name_out"
            )
    inputs = [pair.hook_in for pair in pairs]
    hooks = list(dict.fromkeys(hook for pair in pairs for hook in (pair.hook_in, pair.hook_out)))
    widths = hook_widths(model, hooks, None if head is None else dict.fromkeys(inputs, head))
    order = list(widths)  # as they fired
    for pair in pairs:
        if order.index(pair.hook_out) < order.index(pair.hook_in):
            raise ValueError(
                f"{pair.hook_out} is computed before {pair.hook_in}: a transcoder's output hook "
                "has to come after its input hook, or it cannot stand in for what lies between"
            )
    return {hook: widths[hook] for hook in hooks}
