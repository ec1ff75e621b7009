"""FVU, L0, latent densities and dead latents of a dictionary, summed in one pass.

Every sum is in float64 and every number is independent of how the tokens are cut into batches. The
mean of x is carried along and merged batch by batch (Chan, Golub and LeVeque 1979), so a mean
that is large beside the spread costs no digits, and no second pass is needed.

It knows no models and no hooks: it is given activations, reconstructions and latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.step.activity import firings_by_latent


@dataclass(frozen=True, eq=False)
class Metrics:
    """Over N tokens x with reconstructions x̂ and latents a, all of width d and d_sae:

    fvu                 Σ‖x − x̂‖² / Σ‖x − mean(x)‖²
    mse                 Σ‖x − x̂‖² / (N·d), per element
    cosine              mean of x·x̂ / (‖x‖‖x̂‖); a token where either is zero counts as 0
    l0                  mean number of latents with a ≠ 0
    dead_share          share of latents that fired on no token
    share_above_1_percent, share_above_10_percent
                        share of latents that fired on more than 1 % (10 %) of the tokens
    firing_frequency    per latent, the share of tokens it fired on
    """

    n_tokens: int
    fvu: float
    mse: float
    cosine: float
    l0: float
    dead_share: float
    share_above_1_percent: float
    share_above_10_percent: float
    firing_frequency: Float[Tensor, " d_sae"]


class StreamingMetrics:
    """Accumulates `Metrics` over batches of tokens: `update` each, then `compute`."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._width = 0
        self._mean: Float[Tensor, " d"] | None = None
        self._firings: Int[Tensor, " d_sae"] | None = None
        self._residual = 0.0
        self._deviation = 0.0
        self._cosine = 0.0

    def update(
        self,
        x: Float[Tensor, "tokens d"],
        x_hat: Float[Tensor, "tokens d"],
        acts: Float[Tensor, "tokens d_sae"],
    ) -> None:
        """Take in one batch. `acts` is dense or sparse; an explicit zero in it has not fired.

        Raises ValueError for shapes that do not belong together or to the batches before, and for
        values that are not finite.
        """
        self._check_shapes(x, x_hat, acts)
        if x.shape[0] == 0:
            return
        x, x_hat = _float64(x), _float64(x_hat)
        residual = (x - x_hat).square().sum().item()
        count, mean = x.shape[0], x.mean(dim=0)
        deviation = (x - mean).square().sum().item()
        if not (residual < float("inf") and deviation < float("inf")):
            raise ValueError(
                "x or x_hat holds NaN or an infinity: the sums over this batch are not finite."
            )
        self._residual += residual
        self._cosine += torch.nn.functional.cosine_similarity(x, x_hat, dim=-1).sum().item()
        self._merge(count, mean, deviation)
        if acts.layout != torch.strided:
            acts = acts.to_sparse_coo().coalesce()
        firings = firings_by_latent(acts).cpu()
        self._firings = firings if self._firings is None else self._firings + firings

    def compute(self) -> Metrics:
        """The numbers so far.

        Raises ValueError before two tokens have come, and when all tokens are identical, since the
        variance that FVU divides by is then zero.
        """
        if self.n_tokens < 2 or self._firings is None:
            raise ValueError(
                f"Metrics need at least 2 tokens and have seen {self.n_tokens}. Evaluate on more"
                " text."
            )
        if self._deviation == 0.0:
            raise ValueError(
                f"All {self.n_tokens} activations are identical, so the fraction of variance"
                " unexplained is not defined. Check the tokens and the hook."
            )
        frequency = self._firings.double() / self.n_tokens
        return Metrics(
            n_tokens=self.n_tokens,
            fvu=self._residual / self._deviation,
            mse=self._residual / (self.n_tokens * self._width),
            cosine=self._cosine / self.n_tokens,
            l0=self._firings.sum().item() / self.n_tokens,
            dead_share=(self._firings == 0).double().mean().item(),
            share_above_1_percent=(frequency > 0.01).double().mean().item(),
            share_above_10_percent=(frequency > 0.10).double().mean().item(),
            firing_frequency=frequency,
        )

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean of x so far, in float64. Raises ValueError before the first token."""
        if self._mean is None:
            raise ValueError("No tokens have been taken in yet, so there is no mean.")
        return self._mean

    def _merge(self, count: int, mean: Float[Tensor, " d"], deviation: float) -> None:
        if self._mean is None:
            self.n_tokens, self._mean, self._deviation = count, mean, deviation
            return
        total = self.n_tokens + count
        step = mean - self._mean
        between = step.square().sum().item() * self.n_tokens * count / total
        self._deviation += deviation + between
        self._mean = self._mean + step * (count / total)
        self.n_tokens = total

    def _check_shapes(self, x: Tensor, x_hat: Tensor, acts: Tensor) -> None:
        shapes = f"x {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}, acts {tuple(acts.shape)}"
        if x.ndim != 2 or acts.ndim != 2 or x.shape != x_hat.shape or len(x) != acts.shape[0]:
            raise ValueError(
                f"Expected x and x_hat [tokens, d] and acts [tokens, d_sae]; got {shapes}."
            )
        if self._firings is not None and acts.shape[1] != len(self._firings):
            raise ValueError(f"Earlier batches had {len(self._firings)} latents; got {shapes}.")
        if self._mean is not None and x.shape[1] != self._width:
            raise ValueError(f"Earlier batches had width {self._width}; got {shapes}.")
        self._width = x.shape[1]


def _float64(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()


@torch.no_grad()
def batch_fvu(
    target: Float[Tensor, "batch *groups d"], output: Float[Tensor, "batch *groups d"]
) -> Float[Tensor, "*groups"]:
    """Fraction of variance unexplained on one batch: Σ‖ŷ − y‖² / Σ‖y − mean(y)‖².

    Over the tokens and the last dimension; what lies between (layers) is kept apart. It stays in
    the tensors' own precision and on their device, for a progress bar or a log: `StreamingMetrics`
    is for results.
    """
    residual = (output - target).square().sum(0).sum(-1)
    return residual / (target - target.mean(0)).square().sum(0).sum(-1)
