"""Published recipes' units, brought to SAELens' units in one place.

Gemma Scope divides activations by one number so that E‖x‖² = 1. SAELens' own scaling
(`normalize_activations="expected_average_only_in"`) makes E‖x‖ = √d_in. In between lies a factor
√d_in on x, and with it on everything that is measured like an activation:

    quantity                 in units of E‖x‖² = 1      in SAELens' units
    z, θ, ε, b_enc, b_dec    v                          v · √d_in
    the loss, λ              v                          v · d_in
    W_enc, W_dec (unit rows) v                          v

A training must also *move* alike: Adam steps by about its learning rate whatever the gradient, so
a bias stored in SAELens' units would move √d_in times too slowly. `ScaledParameter` stores it in
the recipe's units and shows it in SAELens'. The loss is divided by d_in, which gives the
recipe's gradients, clipping and Adam's epsilon back.

SAELens scales the mean norm and Gemma Scope the mean square; they differ by the spread of the norms
(a factor √(1 + cv²), a few percent on a language model's residual stream without BOS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

INPUT_UNITS = ("sqrt_d", "unit_rms")


@dataclass(frozen=True)
class Units:
    """How numbers in a config become numbers in SAELens' units.

    Attributes:
        activation: factor on z, θ, ε and biases.
        loss: factor on the loss and on λ.
    """

    activation: float
    loss: float


def units_of(name: str, d_in: int) -> Units:
    """`sqrt_d`: the config speaks SAELens' units. `unit_rms`: it speaks Gemma Scope's.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "sqrt_d":
        return Units(1.0, 1.0)
    if name == "unit_rms":
        return Units(d_in**0.5, float(d_in))
    raise ValueError(
        f"hyperparameter_units is {name!r}; it must be one of {', '.join(INPUT_UNITS)}"
    )


class ScaledParameter(nn.Module):
    """A parametrization: the optimizer sees `(value - offset) / factor`, everyone else `value`."""

    offset: Tensor

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.register_buffer("offset", torch.zeros(()), persistent=False)

    def forward(self, stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return stored * self.factor + self.offset

    def right_inverse(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        # A value from a file is on the host, and is given to a parameter that need not be.
        return (value - self.offset.to(value.device)) / self.factor


class LogParameter(nn.Module):
    """A parametrization: the optimizer sees log(value / factor), everyone else `value` > 0."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def forward(self, stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.factor * torch.exp(stored)

    def right_inverse(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        smallest = torch.finfo(value.dtype).tiny
        return torch.log((value / self.factor).clamp_min(smallest))


def parametrized(module: nn.Module, name: str) -> ScaledParameter | LogParameter | None:
    """The parametrization of a parameter, or None if it is stored as it is."""
    if not parametrize.is_parametrized(module, name):
        return None
    return cast(Any, module).parametrizations[name][0]


def stored(module: nn.Module, name: str) -> Tensor:
    """The tensor the optimizer sees for a parameter."""
    if parametrized(module, name) is None:
        return getattr(module, name)
    return cast(Any, module).parametrizations[name].original


@torch.no_grad()
def set_units(
    module: nn.Module, name: str, factor: float, offset: Float[Tensor, "..."] | None = None
) -> None:
    """Change what a parametrized parameter is stored in units of, in place; its value stays."""
    how = parametrized(module, name)
    assert how is not None
    value = getattr(module, name).detach().clone()
    how.factor = factor
    if offset is not None:
        assert isinstance(how, ScaledParameter)
        how.offset = offset.to(value)
    set_value(module, name, value)


@torch.no_grad()
def set_value(module: nn.Module, name: str, value: Float[Tensor, "..."]) -> None:
    """Give a parameter a value, in place, through its parametrization if it has one."""
    how = parametrized(module, name)
    stored(module, name).copy_(value if how is None else how.right_inverse(value))
