"""This package's SAE and SAELens' architectures, each built with a target L0.

SAELens' `standard` (ReLU + L1) and `gated` have no target L0, so a controller that is not part of
SAELens adjusts their coefficient. Stock `jumprelu` takes a target in its quadratic mode and does
not reach it: with a target of 15, L0 is near 8 on synthetic features. Its L0 falls until the end of
the run, and changing the target during training made the error larger.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens import JumpReLUTrainingSAE as StockJumpReLU
from sae_lens import JumpReLUTrainingSAEConfig as StockJumpReLUConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE

Build = Callable[[int, int, float], Any]

# At every step, the controller adds this times log(L0/target) to the log of the coefficient. With
# ten times as much L0 oscillates, because it responds about fifty steps late.
CONTROL_GAIN = 0.02


class _L0Controlled:
    """A controller that adjusts the coefficients of an SAE to a target L0."""

    target_l0: float
    log_coefficient: float = 0.0

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        factor = math.exp(self.log_coefficient)
        scaled = {name: factor * value for name, value in step_input.coefficients.items()}
        step_input = dataclasses.replace(step_input, coefficients=scaled)
        output = super().training_forward_pass(step_input)  # type: ignore[misc]
        l0 = float((output.feature_acts > 0).sum() / len(output.feature_acts))
        error = math.log(max(l0, 1e-3) / self.target_l0)
        self.log_coefficient += CONTROL_GAIN * min(1.0, max(-1.0, error))
        return output


class L0ControlledGated(_L0Controlled, GatedTrainingSAE):
    """Stock gated with a controller that adjusts its coefficient to the target L0."""


class L0ControlledStandard(_L0Controlled, StandardTrainingSAE):
    """Stock ReLU + L1 with a controller that adjusts its coefficient to the target L0."""


def build_plugin(d_in: int, d_sae: int, l0: float) -> Any:
    """This package's SAE with its default config."""
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, target_l0=l0))


def build_recipe(d_in: int, d_sae: int, l0: float) -> Any:
    """This package's SAE with the recipe `default`."""
    return JumpReLUTrainingSAE(DEFAULT.sae_config(d_in, d_sae, target_l0=l0))


def build_batchtopk(d_in: int, d_sae: int, l0: float) -> Any:
    """SAELens' batchtopk."""
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=l0, **common_fields(d_in, d_sae)))


def build_matryoshka(d_in: int, d_sae: int, l0: float) -> Any:
    """SAELens' Matryoshka batchtopk with five prefixes."""
    widths = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(
        k=l0, matryoshka_widths=widths, **common_fields(d_in, d_sae)
    )
    return MatryoshkaBatchTopKTrainingSAE(cfg)


def build_topk(d_in: int, d_sae: int, l0: float) -> Any:
    """SAELens' topk."""
    return TopKTrainingSAE(TopKTrainingSAEConfig(k=round(l0), **common_fields(d_in, d_sae)))


def build_gated(d_in: int, d_sae: int, l0: float) -> Any:
    """SAELens' gated, L0-controlled."""
    sae = L0ControlledGated(GatedTrainingSAEConfig(**common_fields(d_in, d_sae)))
    sae.target_l0 = l0
    return sae


def build_standard(d_in: int, d_sae: int, l0: float) -> Any:
    """SAELens' ReLU + L1, L0-controlled."""
    sae = L0ControlledStandard(StandardTrainingSAEConfig(**common_fields(d_in, d_sae)))
    sae.target_l0 = l0
    return sae


def build_stock_jumprelu(d_in: int, d_sae: int, l0: float) -> Any:
    """SAELens' jumprelu in quadratic mode, its only mode with a target L0."""
    cfg = StockJumpReLUConfig(
        jumprelu_sparsity_loss_mode="quadratic", target_l0=l0, **common_fields(d_in, d_sae)
    )
    return StockJumpReLU(cfg)


def common_fields(d_in: int, d_sae: int) -> dict[str, Any]:
    """Config fields of all of SAELens' architectures."""
    return {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "expected_average_only_in"}


PLUGIN = "jumprelu-plugin"
ARCHITECTURES: dict[str, Build] = {
    PLUGIN: build_recipe,
    "standard": build_standard,
    "gated": build_gated,
    "topk": build_topk,
    "batchtopk": build_batchtopk,
    "matryoshka_batchtopk": build_matryoshka,
    "jumprelu": build_stock_jumprelu,
}


def lr_decay_fraction(sae: Any) -> float:
    """The part of a run, at its end, in which the learning rate falls.

    That of this package's recipe. For the others it is a fifth: half of the run gave `batchtopk`
    the same FVU on layer 3 of the embedded model, 0.1362 and 0.1361.
    """
    return DEFAULT.lr_decay_fraction if isinstance(sae, JumpReLUTrainingSAE) else 0.2


def centers_itself(sae: Any) -> bool:
    """Whether an SAE subtracts the mean of its data; the others are given centered data."""
    return isinstance(sae, JumpReLUTrainingSAE)
