"""Steering: changes latents' activations while a hooked model runs or generates.

With x the model's activation at the SAE's hook, a = encode(x), and a' the latents after the
interventions, the activation becomes

    x + Σ_i (a'_i − a_i) · W_dec[i]

summed over the latents of the interventions. The SAE's reconstruction error stays in x, as if the
SAE were spliced in with its error term. For `Add` the difference is the amount, so nothing is
encoded. Encoding runs in the SAE's dtype. The sum runs in float32, or in the model's dtype if that
is wider, and the result is cast back.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jumprelu_plugin.models.firing import require_firing
from jumprelu_plugin.models.hooks import (
    attached,
    flat_heads,
    flat_input,
    require_folded,
    sae_sites,
    with_heads,
)
from jumprelu_plugin.models.kv_cache import cache_length_tracked
from jumprelu_plugin.models.number_lists import plain_integers
from jumprelu_plugin.models.trained_on import sae_heads

Positions = int | slice | Sequence[int] | Literal["last"] | None


@dataclass(frozen=True)
class Intervention(ABC):
    """A change to one latent.

    Attributes:
        latent: index of the latent.
        positions: None for every position, "last" for the last position of each forward pass, or an
            integer, list or slice of absolute positions. Positions start at 0 with the first token
            of the sequence (BOS and padding included) and continue through generated tokens, with
            or without a KV cache. Negative positions are refused, because the end of the sequence
            moves while a model generates.
        batch: None for every row, or the index of a row or a list of indices.
    """

    latent: int
    positions: Positions = field(default=None, kw_only=True)
    batch: int | Sequence[int] | None = field(default=None, kw_only=True)

    @property
    def reads(self) -> bool:
        """Whether the change depends on the latent's current activation, so that x is encoded."""
        return True

    @abstractmethod
    def change(self, activation: Tensor, earlier_change: Tensor) -> Tensor:
        """The total change to the latent, this intervention's and the earlier ones'.

        `activation` is the latent's activation in the model, or 0 if no intervention reads it.
        """

    def __post_init__(self) -> None:
        (latent,) = plain_integers("latent", [self.latent])
        object.__setattr__(self, "latent", latent)
        object.__setattr__(self, "positions", _checked_positions(self.positions))
        rows = self.batch
        if rows is not None:
            rows = plain_integers("batch", rows)
            if not rows or min(rows) < 0:
                raise ValueError(
                    f"batch must name rows, none of them negative; got {self.batch!r}."
                )
        object.__setattr__(self, "batch", rows)


@dataclass(frozen=True)
class Add(Intervention):
    """a'_i = a_i + amount, in the SAE's activation units: adds amount · W_dec[i] to x."""

    amount: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("amount", self.amount)

    @property
    def reads(self) -> bool:
        return False

    def change(self, activation: Tensor, earlier_change: Tensor) -> Tensor:
        return earlier_change + self.amount


@dataclass(frozen=True)
class Clamp(Intervention):
    """a'_i = value, in the SAE's activation units, whether or not the latent fires."""

    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("value", self.value)

    def change(self, activation: Tensor, earlier_change: Tensor) -> Tensor:
        return self.value - activation


@dataclass(frozen=True)
class Ablate(Intervention):
    """a'_i = 0."""

    def change(self, activation: Tensor, earlier_change: Tensor) -> Tensor:
        return -activation


@contextmanager
def steer(
    model: Any, sae: Any, interventions: Intervention | Iterable[Intervention]
) -> Iterator[Any]:
    """Within the block, apply `interventions` in every forward pass of `model` and in `generate`.

    The SAE reads and writes the hooks in its metadata (two for a transcoder) and is not spliced in.
    Interventions on one latent act in the given order. Blocks may be nested; an inner block acts on
    the activation that the outer one has changed. On exit, also after an exception, the model's
    hooks are as before, except that a bridge's hook names stay repaired (`hooks.hook_point`). On
    exit, interventions that applied to no position cause a warning.

    In `generate`, "last" depends on the KV cache: with a cache, every generated token is steered
    once, and its change stays in the cache; without one, each forward pass steers only its newest
    token. Absolute positions mean the same with and without a cache.

    Args:
        model: a HookedTransformer, HookedSAETransformer, TransformerBridge or SAETransformerBridge;
            bridges work in and outside compatibility mode.
        sae: an SAE or transcoder whose metadata names its hooks.
        interventions: one or more of `Add`, `Clamp` and `Ablate`.

    Yields:
        The model.

    Raises:
        TypeError: an intervention is of another type.
        ValueError: there are no interventions, a latent is out of range, the SAE has no hook name,
            the model has no such hook or the hook does not fire (where other functions are attached
            already, only the flags of hooks are checked), or the SAE's inputs are scaled outside
            its weights. In a
            forward pass: the activation's width differs from the SAE's, a batch row does not
            exist, or absolute positions meet a cache that does not tell its length.
    """
    plan = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    hook_in, hook_out = sae_sites(sae)
    check_interventions(sae, plan)
    require_firing(model, hook_in, hook_out)
    steering = _Steering(sae, plan, hook_in, hook_out)
    with ExitStack() as stack:
        if any(isinstance(each.positions, slice | tuple) for each in plan):
            stack.enter_context(_track_offset(model, hook_out, steering))
        if hook_in != hook_out and steering.reads:
            stack.enter_context(attached(model, hook_in, steering.read))
        stack.enter_context(attached(model, hook_out, steering.write))
        yield model
    steering.warn_of_unused()


def steering_vector(sae: Any, amounts: Mapping[int, float]) -> Float[Tensor, " d_in"]:
    """Σ amount · W_dec[latent] in float32: the vector that `Add` adds to the activation.

    Args:
        sae: an SAE, or a transcoder, whose vector is [d_out].
        amounts: the amount for each latent.

    Raises:
        ValueError: there are no amounts, a latent is out of range, or the SAE's inputs are scaled.
    """
    plan = [Add(latent, amount) for latent, amount in amounts.items()]
    check_interventions(sae, plan)
    rows = _written_by(sae, [each.latent for each in plan]).detach().float()
    return rows.new_tensor([each.amount for each in plan]) @ rows


class _Steering:
    """The hook functions of one `steer` block, and the state they share."""

    def __init__(self, sae: Any, plan: list[Intervention], hook_in: str, hook_out: str) -> None:
        self.sae, self.plan, self.hook_in, self.hook_out = sae, plan, hook_in, hook_out
        self.head_in, self.head_out = sae_heads(sae)
        self.same_hook = hook_in == hook_out
        self.reads = any(each.reads for each in plan)
        self.latents = sorted({each.latent for each in plan})
        self.offset = 0  # absolute position of the forward pass's first token
        self._activations: Tensor | None = None
        self._ran = False
        self._unused = set(range(len(plan)))

    def read(self, activation: Tensor) -> None:
        """Store the activations of `latents`, [batch, position, latent]."""
        x = flat_heads(activation, self.head_in)
        self._check_width(x, self.sae.cfg.d_in, self.hook_in)
        with flat_input(self.sae):
            acts = self.sae.encode(x.to(self.sae.W_dec.device))
        acts = acts.to_dense() if acts.layout != torch.strided else acts
        self._activations = acts[..., self.latents]

    def write(self, activation: Tensor) -> Tensor:
        """The activation plus the interventions' change."""
        if self.same_hook and self.reads:
            self.read(activation)
        x = flat_heads(activation, self.head_out)
        rows = _written_by(self.sae, self.latents)
        self._check_width(x, rows.shape[-1], self.hook_out)
        dtype = torch.promote_types(x.dtype, torch.float32)
        change = self._change(x.shape[0], x.shape[1], x.device, dtype)
        steered = x.to(dtype) + change @ rows.to(x.device, dtype)
        self._activations = None
        return with_heads(activation, steered.to(activation.dtype), self.head_out)

    def warn_of_unused(self) -> None:
        """Warn of interventions that applied to no position although the model ran."""
        if self._ran and self._unused:
            unused = ", ".join(str(self.plan[i]) for i in sorted(self._unused))
            warnings.warn(
                f"These interventions applied to no position of any forward pass: {unused}."
                " Positions start at 0 with the first token of the sequence.",
                stacklevel=4,
            )

    def _change(
        self, batch: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "batch position latent"]:
        shape = (batch, positions, len(self.latents))
        activations = torch.zeros(shape, device=device, dtype=dtype)
        if self._activations is not None:
            activations = self._activations.to(device, dtype)
        changes = list(torch.zeros_like(activations).unbind(dim=-1))
        self._ran = True
        for index, intervention in enumerate(self.plan):
            mask = _mask(intervention, batch, positions, self.offset)
            if mask.any():
                self._unused.discard(index)
            i = self.latents.index(intervention.latent)
            change = intervention.change(activations[..., i], changes[i])
            changes[i] = torch.where(mask.to(device), change, changes[i])
        return torch.stack(changes, dim=-1)

    def _check_width(self, x: Tensor, width: int, hook: str) -> None:
        if x.shape[-1] != width:
            raise ValueError(
                f"The activation at {hook!r} has width {x.shape[-1]}, and the SAE's is {width}: the"
                " SAE was trained on another hook or another model."
            )


@contextmanager
def _track_offset(model: Any, hook: str, steering: _Steering) -> Iterator[None]:
    """Within the block, set `steering.offset` to the number of positions in the KV cache."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or not hook.startswith("blocks."):
        raise ValueError(
            f"Absolute positions are known only at hooks inside the model's blocks, and {hook!r}"
            " is outside. Use positions=None or 'last' there."
        )

    def set_offset(positions: int) -> None:
        steering.offset = positions

    with cache_length_tracked(model, set_offset):
        yield


def _mask(
    intervention: Intervention, batch: int, positions: int, offset: int
) -> Bool[Tensor, "batch position"]:
    """Where an intervention acts in a forward pass whose first position is `offset`."""
    selected = intervention.positions
    columns = torch.arange(offset, offset + positions)
    if selected is None:
        column_mask = torch.ones(positions, dtype=torch.bool)
    elif selected == "last":
        column_mask = columns == offset + positions - 1
    elif isinstance(selected, slice):
        inside = range(*selected.indices(offset + positions))
        column_mask = torch.isin(columns, torch.tensor(inside, dtype=columns.dtype))
    else:
        column_mask = torch.isin(columns, torch.tensor(selected, dtype=columns.dtype))
    row_mask = torch.ones(batch, dtype=torch.bool)
    rows = intervention.batch
    if isinstance(rows, tuple):
        if max(rows) >= batch:
            raise ValueError(
                f"{intervention} names row {max(rows)}, but the batch has {batch} rows."
            )
        row_mask = torch.isin(torch.arange(batch), torch.tensor(rows))
    return row_mask[:, None] & column_mask[None, :]


def check_interventions(sae: Any, plan: Sequence[Intervention]) -> None:
    """Check that the interventions can act on the latents of `sae`; `steer` does so first.

    Raises:
        TypeError: an intervention is of another type.
        ValueError: there are none, a latent is out of range, or the SAE's inputs are scaled.
    """
    if not plan:
        raise ValueError("No interventions were given. Pass at least one Add, Clamp or Ablate.")
    for each in plan:
        if not isinstance(each, Intervention):
            raise TypeError(f"An intervention is an Add, Clamp or Ablate; got {each!r}.")
        if not 0 <= each.latent < sae.cfg.d_sae:
            raise ValueError(
                f"{each}: the SAE has d_sae {sae.cfg.d_sae}, so its latents are 0 to"
                f" {sae.cfg.d_sae - 1}."
            )
    require_folded(sae)
    if sae.cfg.normalize_activations != "none":
        raise ValueError(
            f"This SAE has normalize_activations={sae.cfg.normalize_activations!r}, which scales"
            " the decoder's output by each token's statistics, so a latent has no fixed steering"
            " vector W_dec[i]."
        )


def _written_by(sae: Any, latents: list[int]) -> Float[Tensor, "latent d_out"]:
    """What each latent writes at an activation of 1.

    That is its decoder row, or in SAELens' TopK SAEs in training the row at unit norm: their
    activations are multiplied by the rows' norms, and divided again where they are decoded.
    """
    rows = sae.W_dec[latents]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows


def _checked_positions(positions: Positions) -> Positions:
    if positions is None or positions == "last":
        return positions
    if isinstance(positions, str):
        raise ValueError(f"positions must be 'last', None, a slice or a list; got {positions!r}.")
    checked: Positions
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        given = plain_integers("positions", [part for part in parts if part is not None])
        numbers = given[:-1] if positions.step is not None else given
        checked, step = positions, positions.step is None or given[-1] > 0
    else:
        numbers = plain_integers("positions", positions)
        checked, step = numbers, bool(numbers)
    if not step or any(n < 0 for n in numbers):
        raise ValueError(
            f"positions must be at least one position, none of them negative; got {positions!r}."
            " For the end of the sequence use 'last'."
        )
    return checked


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value}.")
