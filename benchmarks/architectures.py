"""The architectures of the quality benchmarks, the plugin's and SAELens', each with a target L0.

The plugin is trained with its default config, with Matryoshka prefixes beside it on known features,
and with the recipe `default` on text.

SAELens' `gated` has no target L0, so a controller that is not part of SAELens adjusts its
coefficient. Stock `jumprelu` takes a target in its quadratic mode and does not reach it: with a
target of 15, L0 is near 8 on the synthetic features. Its L0 falls until the end of the run, and
changing the target during training made the error larger.
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
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens import JumpReLUTrainingSAE as StockJumpReLU
from sae_lens import JumpReLUTrainingSAEConfig as StockJumpReLUConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.recipes import DEFAULT, MATRYOSHKA

PLUGIN, PLUGIN_RECIPE = "jumprelu-plugin", "jumprelu-plugin (recipe default)"
PLUGIN_MATRYOSHKA = "jumprelu-plugin (Matryoshka prefixes)"
STOCK, BATCHTOPK = "jumprelu (stock, quadratic)", "batchtopk"
GATED = "gated (L0-controlled)"
Build = Callable[[int, int, float], Any]

# At every step, the controller adds this times log(L0/target) to the log of the coefficient. With
# ten times as much L0 oscillates, because it responds about fifty steps late.
CONTROL_GAIN = 0.02


class L0ControlledGated(GatedTrainingSAE):
    """Stock gated with a controller that adjusts its coefficient to the target L0."""

    target_l0: float
    log_coefficient: float = 0.0

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        factor = math.exp(self.log_coefficient)
        scaled = {name: factor * value for name, value in step_input.coefficients.items()}
        output = super().training_forward_pass(dataclasses.replace(step_input, coefficients=scaled))
        l0 = float((output.feature_acts > 0).sum() / len(output.feature_acts))
        error = math.log(max(l0, 1e-3) / self.target_l0)
        self.log_coefficient += CONTROL_GAIN * min(1.0, max(-1.0, error))
        return output


def _common(d_in: int, d_sae: int) -> dict[str, Any]:
    return {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "expected_average_only_in"}


def _plugin(d_in: int, d_sae: int, l0: float) -> Any:
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, target_l0=l0))


def _recipe(d_in: int, d_sae: int, l0: float) -> Any:
    return JumpReLUTrainingSAE(DEFAULT.sae_config(d_in, d_sae, target_l0=l0))


def _prefixes(d_in: int, d_sae: int, l0: float) -> Any:
    weight = MATRYOSHKA.sae["matryoshka_loss_weight"]
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, target_l0=l0, matryoshka_loss_weight=weight
        )
    )


def _batchtopk(d_in: int, d_sae: int, l0: float) -> Any:
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=l0, **_common(d_in, d_sae)))


def _matryoshka(d_in: int, d_sae: int, l0: float) -> Any:
    widths = [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(k=l0, matryoshka_widths=widths, **_common(d_in, d_sae))
    )


def _topk(d_in: int, d_sae: int, l0: float) -> Any:
    return TopKTrainingSAE(TopKTrainingSAEConfig(k=round(l0), **_common(d_in, d_sae)))


def _gated(d_in: int, d_sae: int, l0: float) -> Any:
    sae = L0ControlledGated(GatedTrainingSAEConfig(**_common(d_in, d_sae)))
    sae.target_l0 = l0
    return sae


def _stock(d_in: int, d_sae: int, l0: float) -> Any:
    # The only mode of stock JumpReLU with a target L0.
    cfg = StockJumpReLUConfig(
        jumprelu_sparsity_loss_mode="quadratic", target_l0=l0, **_common(d_in, d_sae)
    )
    return StockJumpReLU(cfg)


def _pursuit(d_in: int, d_sae: int, l0: float) -> Any:
    cfg = MatchingPursuitTrainingSAEConfig(max_iterations=round(l0), **_common(d_in, d_sae))
    return MatchingPursuitTrainingSAE(cfg)


ARCHITECTURES: dict[str, Build] = {
    PLUGIN: _plugin,
    PLUGIN_MATRYOSHKA: _prefixes,
    PLUGIN_RECIPE: _recipe,
    BATCHTOPK: _batchtopk,
    "matryoshka_batchtopk": _matryoshka,
    "topk": _topk,
    "matching_pursuit": _pursuit,
    GATED: _gated,
    STOCK: _stock,
}
