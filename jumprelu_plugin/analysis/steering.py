"""Change latents while a hooked model runs or generates, and leave the rest of it alone.

With x the model's activation at the SAE's hook, a = encode(x) and a' the latents after the
interventions, the activation becomes

    x + Σ_i (a'_i − a_i) · W_dec[i]

where the sum is over the latents that were named. The part of x that the SAE does not reconstruct
stays in: this is splicing with the error term, and with no interventions it is the identity.
For `Add` the difference is the amount itself and nothing is encoded. Encoding runs in the SAE's
dtype, the sum in float32 or the model's dtype if that is wider, and the result is cast back.

It does not choose latents or strengths, and it does not splice SAEs into models.
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

from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input, require_folded, sae_sites

Positions = int | slice | Sequence[int] | Literal["last"] | None


@dataclass(frozen=True)
class Intervention(ABC):
    """What to do to one latent, and where.

    positions: None for every position, "last" for the last position of each forward pass, or a
        number, list or slice of absolute positions, counted from 0 at the first token of the
        sequence (BOS and padding included) and on through the generated tokens, with or without a
        KV cache.
        Positions do not count from the end, which moves while a model generates.
    batch: None for every row, or a row number or list of them.
    """

    latent: int
    positions: Positions = field(default=None, kw_only=True)
    batch: int | Sequence[int] | None = field(default=None, kw_only=True)

    @property
    def reads(self) -> bool:
        """Whether the latent's present value is needed, and so the SAE's encoder."""
        return True

    @abstractmethod
    def change(self, present: Tensor, change_so_far: Tensor) -> Tensor:
        """The change to the latent, after earlier ones; `present` is 0 unless `reads`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", _checked_positions(self.positions))
        rows = (self.batch,) if isinstance(self.batch, int) else self.batch
        if rows is not None:
            rows = tuple(int(row) for row in rows)
            if not rows or min(rows) < 0:
                raise ValueError(f"batch must name rows from 0 up; got {self.batch!r}.")
        object.__setattr__(self, "batch", rows)


@dataclass(frozen=True)
class Add(Intervention):
    """a'_i = a_i + amount, in the SAE's own activation units: x gains amount · W_dec[i]."""

    amount: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("amount", self.amount)

    @property
    def reads(self) -> bool:
        return False

    def change(self, present: Tensor, change_so_far: Tensor) -> Tensor:
        return change_so_far + self.amount


@dataclass(frozen=True)
class Clamp(Intervention):
    """a'_i = value, in the SAE's own activation units, whether or not the latent fires."""

    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite("value", self.value)

    def change(self, present: Tensor, change_so_far: Tensor) -> Tensor:
        return self.value - present


@dataclass(frozen=True)
class Ablate(Intervention):
    """a'_i = 0."""

    def change(self, present: Tensor, change_so_far: Tensor) -> Tensor:
        return -present


@contextmanager
def steer(
    model: Any, sae: Any, interventions: Intervention | Iterable[Intervention]
) -> Iterator[Any]:
    """Apply `interventions` to every forward pass of `model` in the block, `generate` included.

    `model` is a HookedTransformer, HookedSAETransformer, TransformerBridge or SAETransformerBridge;
    a bridge may be in compatibility mode or not. The SAE reads and writes the hooks in its
    metadata (two for a transcoder) and is not spliced in. Interventions on one latent act in the
    order given. Blocks nest: an inner one sees what the outer one has done. On leaving, by an
    exception too, the model is as it was before, other hooks and all. One thing is put right and
    stays so: a bridge's names for this hook, where an earlier splice left them wrong (see
    `hooks.hook_point`).

    "last" with `generate`: with a KV cache every generated token is the last once and keeps what
    was done to it; without one, only the newest token of each pass is changed. Absolute positions
    agree in both.

    Raises ValueError for no interventions, a latent the SAE does not have, an SAE without a hook
    name, an unknown hook, and an SAE whose inputs are scaled outside its weights; in the forward
    pass, for an activation of another width than the SAE's and for a row the batch does not have.
    Warns on leaving when the model ran and an intervention touched no position at all.
    """
    plan = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    hook_in, hook_out = sae_sites(sae)
    _check_plan(plan, sae)
    steering = _Steering(sae, plan, hook_in, hook_out)
    with ExitStack() as stack:
        if any(isinstance(each.positions, slice | tuple) for each in plan):
            stack.enter_context(_counting(model, hook_out, steering))
        if hook_in != hook_out and steering.reads:
            stack.enter_context(attached(model, hook_in, steering.read))
        stack.enter_context(attached(model, hook_out, steering.write))
        yield model
    steering.warn_of_idle()


def steering_vector(sae: Any, amounts: Mapping[int, float]) -> Float[Tensor, " d_in"]:
    """Σ amount · W_dec[latent] in float32: what `Add` for each latent adds to the activation.

    Of width d_out for a transcoder. Raises ValueError as `steer` does.
    """
    plan = [Add(latent, amount) for latent, amount in amounts.items()]
    _check_plan(plan, sae)
    rows = sae.W_dec.detach()[[each.latent for each in plan]].float()
    return rows.new_tensor([each.amount for each in plan]) @ rows


class _Steering:
    """One steering block's hook functions and what they remember between them."""

    def __init__(self, sae: Any, plan: list[Intervention], hook_in: str, hook_out: str) -> None:
        self.sae, self.plan, self.hook_in, self.hook_out = sae, plan, hook_in, hook_out
        self.same_hook = hook_in == hook_out
        self.reads = any(each.reads for each in plan)
        self.latents = sorted({each.latent for each in plan})
        self.offset = 0
        self._present: Tensor | None = None
        self._ran = False
        self._idle = set(range(len(plan)))

    def read(self, activation: Tensor) -> None:
        """Keep the named latents' present values, [batch, position, named latent]."""
        x = flat_heads(activation)
        self._check_width(x, self.sae.cfg.d_in, self.hook_in)
        with flat_input(self.sae):
            acts = self.sae.encode(x.to(self.sae.W_dec.device))
        acts = acts.to_dense() if acts.layout != torch.strided else acts
        self._present = acts[..., self.latents]

    def write(self, activation: Tensor) -> Tensor:
        """The activation with the interventions' change added."""
        if self.same_hook and self.reads:
            self.read(activation)
        x = flat_heads(activation)
        rows = self.sae.W_dec[self.latents]
        self._check_width(x, rows.shape[-1], self.hook_out)
        dtype = torch.promote_types(x.dtype, torch.float32)
        change = self._change(x.shape[0], x.shape[1], x.device, dtype)
        steered = x.to(dtype) + change @ rows.to(x.device, dtype)
        self._present = None
        return steered.to(activation.dtype).reshape(activation.shape)

    def warn_of_idle(self) -> None:
        """Say which interventions did nothing although the model ran."""
        if self._ran and self._idle:
            idle = ", ".join(str(self.plan[i]) for i in sorted(self._idle))
            warnings.warn(
                f"These interventions touched no position of any forward pass: {idle}. Positions"
                " are counted from 0 at the first token of the sequence.",
                stacklevel=4,
            )

    def _change(
        self, batch: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "batch position latent"]:
        shape = (batch, positions, len(self.latents))
        present = torch.zeros(shape, device=device, dtype=dtype)
        if self._present is not None:
            present = self._present.to(device, dtype)
        changes = list(torch.zeros_like(present).unbind(dim=-1))
        self._ran = True
        for number, each in enumerate(self.plan):
            where = _where(each, batch, positions, self.offset)
            if where.any():
                self._idle.discard(number)
            i = self.latents.index(each.latent)
            new = each.change(present[..., i], changes[i])
            changes[i] = torch.where(where.to(device), new, changes[i])
        return torch.stack(changes, dim=-1)

    def _check_width(self, x: Tensor, width: int, hook: str) -> None:
        if x.shape[-1] != width:
            raise ValueError(
                f"The activation at {hook!r} has width {x.shape[-1]} and the SAE has {width}."
                " This SAE belongs to another hook or another model."
            )


@contextmanager
def _counting(model: Any, hook: str, steering: _Steering) -> Iterator[None]:
    """Keep `steering.offset` at the number of positions a KV cache already holds."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or not hook.startswith("blocks."):
        raise ValueError(
            f"Positions can be counted only at hooks inside the model's blocks; {hook!r} is"
            " elsewhere. Use positions=None or 'last' there."
        )

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        steering.offset = _cached_positions(kwargs)

    handle = blocks[0].register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _cached_positions(kwargs: Mapping[str, Any]) -> int:
    entry = kwargs.get("past_kv_cache_entry")  # TransformerLens: one layer's keys and values
    if entry is not None:
        return entry.past_keys.shape[1]
    cache = kwargs.get("past_key_values")  # transformers: all layers, as a bridge passes them on
    return int(cache.get_seq_length()) if cache is not None else 0


def _where(
    each: Intervention, batch: int, positions: int, offset: int
) -> Bool[Tensor, "batch position"]:
    """Where an intervention acts in a forward pass whose first position is `offset`."""
    columns = torch.arange(offset, offset + positions)
    if each.positions is None:
        chosen = torch.ones(positions, dtype=torch.bool)
    elif each.positions == "last":
        chosen = columns == offset + positions - 1
    elif isinstance(each.positions, slice):
        inside = range(*each.positions.indices(offset + positions))
        chosen = torch.isin(columns, torch.tensor(inside, dtype=columns.dtype))
    else:
        chosen = torch.isin(columns, torch.tensor(each.positions, dtype=columns.dtype))
    rows = torch.ones(batch, dtype=torch.bool)
    if isinstance(each.batch, tuple):
        if max(each.batch) >= batch:
            raise ValueError(f"{each} asks for row {max(each.batch)}; the batch has {batch} rows.")
        rows = torch.isin(torch.arange(batch), torch.tensor(each.batch))
    return rows[:, None] & chosen[None, :]


def _check_plan(plan: Sequence[Intervention], sae: Any) -> None:
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
            " each token's decoder output by that token's own statistics; a latent then has no"
            " fixed direction W_dec[i] to steer along."
        )


def _checked_positions(positions: Positions) -> Positions:
    if positions is None or positions == "last":
        return positions
    if isinstance(positions, str):
        raise ValueError(f"positions must be 'last', None, a slice or a list; got {positions!r}.")
    checked: Positions
    if isinstance(positions, slice):
        numbers = [n for n in (positions.start, positions.stop) if n is not None]
        checked, step = positions, positions.step is None or positions.step > 0
    else:
        numbers = [positions] if isinstance(positions, int) else [int(n) for n in positions]
        checked, step = tuple(numbers), bool(numbers)
    if not step or any(n < 0 for n in numbers):
        raise ValueError(
            f"positions must be counted from 0 up, and at least one; got {positions!r}. For the"
            " end of the sequence use 'last'."
        )
    return checked


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value}.")
