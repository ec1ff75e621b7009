"""Where data lies and how far it spreads, measured so that no outlier token decides.

Training on a·x + v, for any scale a > 0 and constant vector v, should be the same training. So what
training reads of the data's size is measured here, and moves along with a and v: the center, from
which outliers are told, and the spread, in whose units biases, thresholds and losses are trained
(`control.units`).

A language model's residual stream may have a mean five times as long as its spread and one token in
a thousand forty times as far from the mean as the others (docs/results.md). The norm of such
activations, mean included, says nothing about either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.step.losses import outlier_token_weights

# Times the median distance from the center; a token further away counts as if it were that far.
# Massive activations are at forty and more. With less, they are reconstructed badly where L0 is low
# (docs/ablations.md).
OUTLIER_NORM_RATIO = 10.0
# From the median of each coordinate to the mean of the tokens that are no outliers.
_ROUNDS = 2


@dataclass(frozen=True)
class Standardization:
    """x ↦ (x - center) / scale has its center at 0 and E‖x‖² = width, outliers apart.

    Attributes:
        center: mean of the tokens that are no outliers, [width].
        scale: root mean square of a coordinate's distance from it.
    """

    center: Float[Tensor, " width"]
    scale: float


@torch.no_grad()
def measure(rows: Float[Tensor, "tokens width"]) -> Standardization:
    """Center and spread of a batch; of a·x + v they are a·center + v and a·scale.

    Args:
        rows: in float32 or float64.

    Raises:
        ValueError: the rows are not finite, or all the same.
    """
    if not torch.isfinite(rows).all():
        raise ValueError(
            "activations are NaN or infinite; check the hook, and that the model runs in a dtype "
            "that can hold its activations"
        )
    center = rows.median(0).values
    for _ in range(_ROUNDS):
        inlier = outlier_token_weights(rows, OUTLIER_NORM_RATIO, center) == 1
        center = rows[inlier].mean(0)
    centered = rows - center
    weights = outlier_token_weights(centered, OUTLIER_NORM_RATIO)
    square = weights @ centered.square().mean(1) / len(rows)
    if not square > 0:
        raise ValueError("the first batch's activations are all the same: nothing to learn from")
    return Standardization(center, float(square.sqrt()))
