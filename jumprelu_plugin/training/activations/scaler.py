"""Scales for the input and the target of a transcoder, one each.

SAELens' trainer scales activations with an `ActivationScaler` of one number, which it estimates
before the first step, saves with a checkpoint and hands to the SAE for folding. `PairScaler` has
two numbers, for rows [x ‖ y].
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

from jumprelu_plugin.saes.resolved import OUTLIER_NORM_RATIO
from jumprelu_plugin.step.losses import outlier_token_weights


class PairScaler(ActivationScaler):
    """Multiplies both sides so that E‖x‖² = E‖y‖² = d_in, with the norms of outliers limited.

    Both sides are scaled to d_in, whatever d_out is: z, θ, ε, the loss and λ then share one unit,
    and a recipe's numbers mean what they mean for an SAE. Gemma Scope (arXiv 2408.05147) divides
    input and target each by its own root mean square, which is the same up to the common √d_in.

    A token whose norm is more than ten times the batch's median counts with ten times the median.
    In the outputs of some MLPs one token in a thousand has a norm hundreds of times the others' and
    holds nearly all of the mean square ("massive activations", arXiv 2402.17762). Divided by that,
    the other tokens are so short that every step of the optimizer overshoots
    (docs/guides/transcoders-and-clt.md).

    Attributes:
        scaling_factor: (s_in, s_out), or None before it is measured.
    """

    scaling_factor: Any = None

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self._squares = [0.0, 0.0]
        self._rows = 0

    @override
    def scale(self, acts: Float[Tensor, "batch d_in+d_out"]) -> Float[Tensor, "batch d_in+d_out"]:
        return self._multiply(acts, 1)

    @override
    def unscale(self, acts: Float[Tensor, "batch d_in+d_out"]) -> Float[Tensor, "batch d_in+d_out"]:
        return self._multiply(acts, -1)

    def _multiply(self, rows: Tensor, power: int) -> Tensor:
        if self.scaling_factor is None:
            return rows
        source, target = rows.split([self.d_in, self.d_out], dim=-1)
        scale_in, scale_out = self.scaling_factor
        return torch.cat([source * scale_in**power, target * scale_out**power], dim=-1)

    @override
    def estimate_scaling_factor(
        self, d_in: int, data_provider: DataProvider, n_batches_for_norm_estimate: int = 1000
    ) -> None:
        """Measure both scales on the next batches.

        Raises:
            ValueError: a side is zero everywhere, or not finite.
        """
        for _ in range(n_batches_for_norm_estimate):
            self.observe(next(data_provider))
        self.finish()

    @torch.no_grad()
    def observe(self, rows: Float[Tensor, "batch d_in+d_out"]) -> None:
        """Add a batch to the estimate."""
        for side, part in enumerate(rows.split([self.d_in, self.d_out], dim=-1)):
            values = part.double()
            counted = outlier_token_weights(values, OUTLIER_NORM_RATIO) @ values.square().sum(1)
            self._squares[side] += counted.item()
        self._rows += len(rows)

    def finish(self) -> None:
        """Set the scales from the observed batches.

        Raises:
            ValueError: a side is zero everywhere, or not finite.
        """
        for name, total in zip(("input", "output"), self._squares, strict=True):
            if not 0 < total < math.inf:
                raise ValueError(
                    f"the mean square of the {name} hook's activations over {self._rows} tokens is "
                    f"{total / max(self._rows, 1)}: there is no scale to divide by. Check the "
                    "hook, and that the model runs in a dtype that can hold its activations"
                )
        self.scaling_factor = tuple(
            math.sqrt(self.d_in * self._rows / total) for total in self._squares
        )

    @override
    def load(self, file_path: str | Path) -> None:
        super().load(file_path)
        if self.scaling_factor is not None:
            self.scaling_factor = tuple(self.scaling_factor)
