"""Scales for the input and the target of a transcoder, one each, and their centers.

SAELens' trainer scales activations with an `ActivationScaler` of one number, which it estimates
before the first step, saves with a checkpoint and hands to the SAE for folding. `PairScaler` has
two numbers and two centers, for rows [x ‖ y].
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.control.standardization import OUTLIER_NORM_RATIO, measure
from jumprelu_plugin.saes.parameters import PairScale
from jumprelu_plugin.step.losses import outlier_token_weights


class PairScaler(ActivationScaler):
    """Centers both sides and makes E‖x‖² = E‖y‖² = d_in, with outliers limited.

    Training on a·x + v and b·y + w is then the same training, for any scales and constant vectors.

    Both sides are scaled to d_in, whatever d_out is: z, θ, ε, the loss and λ then share one unit,
    and a recipe's numbers mean what they mean for an SAE. Gemma Scope (arXiv 2408.05147) divides
    input and target each by its own root mean square, which is the same up to the common √d_in.

    A token further from the center than ten times the batch's median distance counts as if it were
    that far. In the outputs of some MLPs one token in a thousand has a norm hundreds of times the
    others' and holds nearly all of the mean square ("massive activations", arXiv 2402.17762).
    Divided by that, the other tokens are so short that every step of the optimizer overshoots
    (docs/guides/transcoders-and-clt.md).

    Args:
        centers: whether to center both sides. A fixed coefficient, as published, belongs to the
            scale of activations that are not centered.

    Attributes:
        scaling_factor: both scales and centers, or None before they are measured.
    """

    scaling_factor: Any = None

    def __init__(self, d_in: int, d_out: int, *, centers: bool = True):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self._sides = [_Side(d_in, centers), _Side(d_out, centers)]

    @override
    def scale(self, acts: Float[Tensor, "batch d_in+d_out"]) -> Float[Tensor, "batch d_in+d_out"]:
        if self.scaling_factor is None:
            return acts
        factor, center = self._rows_factor_and_center(acts)
        return (acts - center) * factor

    @override
    def unscale(self, acts: Float[Tensor, "batch d_in+d_out"]) -> Float[Tensor, "batch d_in+d_out"]:
        if self.scaling_factor is None:
            return acts
        factor, center = self._rows_factor_and_center(acts)
        return acts / factor + center

    def _rows_factor_and_center(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What a row is multiplied by and what is subtracted from it, [d_in + d_out] each."""
        scale: PairScale = self.scaling_factor
        widths = self.d_in, self.d_out
        factors = [rows.new_full((n,), s) for n, s in zip(widths, scale[:2], strict=True)]
        centers = [
            rows.new_tensor(center) if len(center) else rows.new_zeros(width)
            for width, center in zip(widths, scale[2:], strict=True)
        ]
        return torch.cat(factors), torch.cat(centers)

    @override
    def estimate_scaling_factor(
        self, d_in: int, data_provider: DataProvider, n_batches_for_norm_estimate: int = 1000
    ) -> None:
        """Measure scales and centers on the next batches.

        Raises:
            ValueError: a side is the same everywhere, or not finite.
        """
        for _ in range(n_batches_for_norm_estimate):
            self.observe(next(data_provider))
        self.finish()

    @torch.no_grad()
    def observe(self, rows: Float[Tensor, "batch d_in+d_out"]) -> None:
        """Add a batch to the estimate."""
        for side, part in zip(self._sides, rows.split([self.d_in, self.d_out], -1), strict=True):
            side.observe(part.double())

    def finish(self) -> None:
        """Set scales and centers from the observed batches.

        Raises:
            ValueError: a side is the same everywhere, or not finite.
        """
        for name, side in zip(("input", "output"), self._sides, strict=True):
            if not 0 < side.variance() < math.inf:
                raise ValueError(
                    f"the mean square of the {name} hook's activations over {side.rows} tokens is "
                    f"{side.variance()}: there is no scale to divide by. Check the hook, and that "
                    "the model runs in a dtype that can hold its activations"
                )
        source, target = self._sides
        self.scaling_factor = PairScale(
            math.sqrt(self.d_in / source.variance()),
            math.sqrt(self.d_in / target.variance()),
            source.center(),
            target.center(),
        )

    @override
    def load(self, file_path: str | Path) -> None:
        super().load(file_path)
        if self.scaling_factor is not None:
            self.scaling_factor = PairScale.of(self.scaling_factor)


def pair_scaler(transcoder: Any) -> PairScaler:
    """The scaler that the rows of a training transcoder are trained with."""
    centers = transcoder.resolved.standardize_activations
    return PairScaler(transcoder.cfg.d_in, transcoder.cfg.width_out, centers=centers)


class _Side:
    """The sums over one side's rows from which its center and its spread follow.

    Attributes:
        rows: seen.
    """

    def __init__(self, width: int, centers: bool):
        self.centers, self.rows = centers, 0
        # Deviations are summed from where the first batch has its center: from the origin, a long
        # mean would leave few digits for the spread.
        self._origin: Tensor | None = None if centers else torch.zeros(width, dtype=torch.float64)
        self._inliers, self._sum, self._square = 0, torch.zeros(width, dtype=torch.float64), 0.0

    def observe(self, values: Float[Tensor, "batch width"]) -> None:
        if self._origin is None:
            # What has no spread is refused at the end, with the side's name.
            spreads = bool(torch.isfinite(values).all()) and bool((values != values[:1]).any())
            self._origin = measure(values).center if spreads else torch.zeros_like(values[0])
        self._origin, self._sum = self._origin.to(values.device), self._sum.to(values.device)
        deviations = values - self._origin
        weights = outlier_token_weights(deviations, OUTLIER_NORM_RATIO)
        self._square += float(weights @ deviations.square().sum(1))
        self._sum += deviations[weights == 1].sum(0)
        self._inliers += int((weights == 1).sum())
        self.rows += len(values)

    def _shift(self) -> Tensor:
        return self._sum / self._inliers if self.centers else torch.zeros_like(self._sum)

    def variance(self) -> float:
        """Mean squared distance from the center, outliers limited."""
        return self._square / max(self.rows, 1) - float(self._shift().square().sum())

    def center(self) -> tuple[float, ...]:
        if not self.centers or self._origin is None:
            return ()
        return tuple((self._origin + self._shift()).tolist())
