"""The architectures of the quality benchmarks, by their names in records.

They are the sweep's (`jumprelu_plugin/studies/sweep/architectures.py`), with matching pursuit. The
plugin is trained with its default config, with Matryoshka prefixes beside it on known features, and
with the recipe `default` on text.
"""

from __future__ import annotations

from typing import Any

from sae_lens import MatchingPursuitTrainingSAEConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.recipes import MATRYOSHKA
from jumprelu_plugin.studies.sweep.architectures import (
    Build,
    build_batchtopk,
    build_gated,
    build_matryoshka,
    build_plugin,
    build_recipe,
    build_stock_jumprelu,
    build_topk,
    common_fields,
)

PLUGIN, PLUGIN_RECIPE = "jumprelu-plugin", "jumprelu-plugin (recipe default)"
PLUGIN_MATRYOSHKA = "jumprelu-plugin (Matryoshka prefixes)"
STOCK, BATCHTOPK = "jumprelu (stock, quadratic)", "batchtopk"
GATED = "gated (L0-controlled)"


def _prefixes(d_in: int, d_sae: int, l0: float) -> Any:
    weight = MATRYOSHKA.sae["matryoshka_loss_weight"]
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, target_l0=l0, matryoshka_loss_weight=weight
        )
    )


def _pursuit(d_in: int, d_sae: int, l0: float) -> Any:
    cfg = MatchingPursuitTrainingSAEConfig(max_iterations=round(l0), **common_fields(d_in, d_sae))
    return MatchingPursuitTrainingSAE(cfg)


ARCHITECTURES: dict[str, Build] = {
    PLUGIN: build_plugin,
    PLUGIN_MATRYOSHKA: _prefixes,
    PLUGIN_RECIPE: build_recipe,
    BATCHTOPK: build_batchtopk,
    "matryoshka_batchtopk": build_matryoshka,
    "topk": build_topk,
    "matching_pursuit": _pursuit,
    GATED: build_gated,
    STOCK: build_stock_jumprelu,
}
