"""Access to the activation at a named hook, for every kind of hooked model.

This module resolves hook names and attaches and removes functions, so that steering and evaluation
behave alike on HookedTransformer, HookedSAETransformer, TransformerBridge and SAETransformerBridge.
Functions are attached to the hook point itself, not with `model.hooks(...)`. On a bridge,
`model.hooks(...)` ignores alias names outside compatibility mode, and calls a function twice if
splicing and resetting an SAE has left a hook point with a wrong name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

# SAELens does not apply these at inference. Until the scale is folded into the weights, such an SAE
# reads the raw activation in the wrong units.
_UNFOLDED_NORMALIZATIONS = ("expected_average_only_in", "covariance_whitening")


def sae_sites(sae: Any) -> tuple[str, str]:
    """The hooks an SAE reads and writes, `(hook_in, hook_out)`; equal unless it is a transcoder.

    Raises:
        ValueError: `sae.cfg.metadata.hook_name` is not set.
    """
    hook_in = sae.cfg.metadata.hook_name
    if not hook_in:
        raise ValueError(
            f"{type(sae).__name__} has no hook name, so it is unknown which activation it reads."
            " Set sae.cfg.metadata.hook_name, for example 'blocks.12.hook_resid_post'."
        )
    return hook_in, sae.cfg.metadata.hook_name_out or hook_in


def require_folded(sae: Any) -> None:
    """Raise ValueError if the SAE expects inputs scaled by a factor that is not in its weights."""
    normalization = sae.cfg.normalize_activations
    if normalization in _UNFOLDED_NORMALIZATIONS:
        raise ValueError(
            f"This SAE has normalize_activations={normalization!r}: its weights expect scaled"
            " inputs, and SAELens does not scale them at inference. Fold the scale into the"
            " weights first with sae.fold_activation_norm_scaling_factor(scale); a checkpoint keeps"
            " the scale in its activation_scaler.json."
        )


def canonical_name(model: Any, name: str) -> str:
    """The module path of hook `name`, with a bridge's alias resolved."""
    collect = getattr(model, "_collect_hook_aliases_from_registry", None)
    if collect is None:
        return name
    target = {**model.hook_aliases, **collect()}.get(name)
    return target if isinstance(target, str) else name


def hook_point(model: Any, name: str) -> HookPoint:
    """The hook point called `name` (alias or canonical) in `model`'s forward pass.

    On a bridge, splicing in an SAE and resetting leaves the new hook point with a shortened name
    and the alias pointing to the old hook point. A function set there with `bridge.hooks(...)` is
    then called never or twice. This function repairs both for this name; it does not change a model
    without the fault.

    Raises:
        TypeError: the model has no hooks.
        ValueError: the name is unknown, or an SAE is spliced in at this hook.
    """
    if not hasattr(model, "hook_dict"):
        raise TypeError(
            f"{type(model).__name__} has no hook points. Load the model as a HookedTransformer,"
            " HookedSAETransformer, TransformerBridge or SAETransformerBridge."
        )
    path = canonical_name(model, name)
    point = _point(model, path)
    if not isinstance(point, HookPoint):
        if hasattr(point, "hook_sae_output"):
            raise ValueError(
                f"An SAE is spliced into the model at {name!r}, in place of the hook point. Call"
                " model.reset_saes() first."
            )
        raise ValueError(f"The model has no hook {name!r}. {_suggestion(model, name)}")
    _repair(model, name, path, point)
    return point


@contextmanager
def attached(
    model: Any, name: str, function: Callable[[Tensor], Tensor | None]
) -> Iterator[HookPoint]:
    """Within the block, call `function` with the activation at hook `name` in each forward pass.

    A returned tensor replaces the activation; None leaves it unchanged. Functions already on the
    hook run first and are kept. On exit, also after an exception, only this function is removed. It
    is a permanent hook, so `model.reset_hooks()` inside the block keeps it.

    Raises:
        RuntimeError: something removed the function within the block, so that later forward passes
            ran without it. Raised on exit.
    """
    point = hook_point(model, name)

    def call(tensor: Tensor, *, hook: Any) -> Tensor | None:
        return function(tensor)

    point.add_hook(call, is_permanent=True)
    handle = point.fwd_hooks[-1]
    try:
        yield point
        replaced = _point(model, canonical_name(model, name)) is not point
        lost = replaced or handle not in point.fwd_hooks
    finally:
        handle.hook.remove()
        if handle in point.fwd_hooks:
            point.fwd_hooks.remove(handle)
    if lost:
        raise RuntimeError(
            f"The function at {name!r} was removed inside the block (an SAE was spliced in there,"
            " or hooks were reset with including_permanent=True), so later forward passes ran"
            " without it. Splice before entering the block, and do not reset hooks inside it."
        )


def flat_heads(
    activation: Float[Tensor, "batch position ..."], head: int | None = None
) -> Float[Tensor, "batch pos d"]:
    """What a dictionary reads: all heads side by side, or the head of this index alone.

    [batch, position, d] is left as it is, and [batch, position, head, d_head] becomes
    [batch, position, head · d_head], or [batch, position, d_head] with `head`. `with_heads` is the
    inverse.

    Raises:
        ValueError: the activation has neither three nor four axes, or not this head.
    """
    if head is not None:
        if activation.ndim != 4 or not 0 <= head < activation.shape[2]:
            raise ValueError(
                f"hook_head_index is {head}, and the activation has shape "
                f"{tuple(activation.shape)}; expected [batch, position, head, d_head] with such a "
                "head"
            )
        return activation[:, :, head]
    if activation.ndim == 4:
        return activation.flatten(start_dim=-2)
    if activation.ndim == 3:
        return activation
    raise ValueError(
        f"Expected an activation of shape [batch, position, d] or [batch, position, head, d_head],"
        f" got {tuple(activation.shape)}."
    )


def with_heads(
    activation: Float[Tensor, "batch position ..."],
    changed: Float[Tensor, "batch pos d"],
    head: int | None = None,
) -> Float[Tensor, "batch position ..."]:
    """The activation with `changed` in place of what `flat_heads` gave; other heads are kept."""
    if head is None:
        return changed.reshape(activation.shape)
    whole = activation.clone()
    whole[:, :, head] = changed
    return whole


@contextmanager
def flat_input(sae: Any) -> Iterator[None]:
    """Within the block, `sae.encode` takes flattened activations, also for a `hook_z` SAE.

    The SAE's reshaping state is restored on exit.
    """
    names = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")
    attributes = sae.__dict__
    state = {name: attributes[name] for name in names if name in attributes}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name in names:
            attributes.pop(name, None)
        attributes.update(state)


def _repair(model: Any, name: str, path: str, point: HookPoint) -> None:
    """Make the name, the registry and the attribute all refer to the forward pass's `point`."""
    if point.name not in model.hook_dict:
        point.name = path
    registry = getattr(model, "_hook_registry", {})
    if registry.get(name, point) is not point:
        registry[name] = point
    parent, _, leaf = name.rpartition(".")
    owner = _at_path(model, parent) if parent else model
    alias = None if owner is None else vars(owner).get(leaf)
    if isinstance(alias, HookPoint) and alias is not point:
        object.__setattr__(owner, leaf, point)


def _point(model: Any, path: str) -> Any:
    # The hooks of SAELens' HookedProxyLM have the names of modules, and are beside them.
    if hasattr(model, "named_modules_dict"):
        return model.hook_dict.get(path)
    return _at_path(model, path)


def _at_path(model: Any, path: str) -> Any:
    module = model
    for part in path.split("."):
        try:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        except (AttributeError, IndexError, TypeError):
            return None
    return module


def _suggestion(model: Any, name: str) -> str:
    collect = getattr(model, "_collect_hook_aliases_from_registry", dict)
    known = sorted({*model.hook_dict, *collect()})
    close = get_close_matches(name, known, n=5, cutoff=0.5)
    if close:
        return f"Close names: {', '.join(close)}."
    return f"It has {len(known)} hooks; list them with sorted(model.hook_dict)."
