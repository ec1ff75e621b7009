"""Which hooks fire in a forward pass, and how wide their activations are.

A model has hooks that exist and never fire: TransformerLens computes some only when a flag is set,
and a bridge names some that its architecture does not have. A function at such a hook is never
called, so every command asks here before it computes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from jumprelu_plugin.models.hooks import attached, hook_point

# By the hook's name within its block: the flag in the model's config that turns it on.
_FLAGS = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "attn.hook_result": "use_attn_result",
}
# Lengths of the two probes, which tell a width from a number of positions.
_LENGTHS = (3, 5)


def require_firing(model: Any, *hooks: str) -> None:
    """Check that hooks exist and fire in a forward pass; runs the model on three tokens.

    Where functions are attached to the model already, they are left alone and the model is not run:
    then only the hooks that a flag turns on are checked.

    Raises:
        TypeError: the model has no hooks.
        ValueError: a hook does not exist, or does not fire; the message names the flag that turns
            it on.
    """
    for hook in hooks:
        hook_point(model, hook)
        flag = hook_flag(hook)
        if flag is not None and getattr(getattr(model, "cfg", None), flag, True) is False:
            raise ValueError(_silent(hook))
    if any(point.fwd_hooks for point in model.hook_dict.values()):
        return
    _fired(model, hooks, _LENGTHS[0])


def hook_flag(hook: str) -> str | None:
    """The flag that turns a hook on, such as `use_hook_mlp_in`; None if it fires without one."""
    return _FLAGS.get(_within_block(hook))


def hook_widths(
    model: Any, hooks: Iterable[str], heads: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Width of the activations at each hook, in the order in which they fire in a forward pass.

    Args:
        hooks: their names.
        heads: the index of the head that is read, by hook; elsewhere heads are flattened.

    Raises:
        ValueError: a hook does not exist or does not fire, its activations are not one vector a
            token, or it has no such head where one is read.
    """
    hooks, heads = list(dict.fromkeys(hooks)), heads or {}
    first, second = (_fired(model, hooks, length) for length in _LENGTHS)
    widths: dict[str, int] = {}
    for hook, shape in first.items():
        again = second[hook]
        if (shape[1], again[1]) != _LENGTHS or shape[2:] != again[2:] or len(shape) < 3:
            raise ValueError(
                f"the activations at {hook!r} have shape {_named(shape, again)}, which is not one "
                "vector a token: a dictionary needs a hook of shape [batch, position, width] or "
                "[batch, position, head, width], such as blocks.0.hook_resid_post"
            )
        if hook in heads and len(shape) != 4:
            raise ValueError(
                f"hook_head_index is set, but the activations at {hook!r} have no heads: leave it "
                "out, or give a hook with heads, such as blocks.0.attn.hook_z"
            )
        if hook in heads and not 0 <= heads[hook] < shape[2]:
            raise ValueError(
                f"hook_head_index is {heads[hook]}, and the activations at {hook!r} have "
                f"{shape[2]} heads: give 0 to {shape[2] - 1}, or leave it out for all of them"
            )
        widths[hook] = shape[-1] if hook in heads else shape[2:].numel()
    return widths


@torch.no_grad()
def _fired(model: Any, hooks: Iterable[str], length: int) -> dict[str, torch.Size]:
    """Shapes of the activations, in the order in which the hooks fire on `length` tokens."""
    shapes: dict[str, torch.Size] = {}

    def note(hook: str) -> Any:
        return lambda activation: shapes.setdefault(hook, activation.shape) and None

    hooks = list(hooks)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(attached(model, hook, note(hook)))
        model(torch.zeros((1, length), dtype=torch.long, device=device), return_type="logits")
    for hook in hooks:
        if hook not in shapes:
            raise ValueError(_silent(hook))
    return shapes


def _within_block(hook: str) -> str:
    return hook.split(".", 2)[-1] if hook.startswith("blocks.") else hook


def _silent(hook: str) -> str:
    flag = hook_flag(hook)
    remedy = "give another hook"
    if flag is not None:
        remedy = (
            f"turn it on with model.set_{flag}(True), or load the model with "
            f'model_from_pretrained_kwargs={{"{flag}": true}}; or give another hook'
        )
    return f"the hook {hook!r} exists but does not fire in a forward pass of this model: {remedy}"


def _named(shape: torch.Size, again: torch.Size) -> str:
    axes = [
        "position" if (first, second) == _LENGTHS else str(first)
        for first, second in zip(shape, again, strict=True)
    ]
    return f"[{', '.join(['batch', *axes[1:]])}]"
