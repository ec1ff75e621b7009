"""Where a training starts: thresholds, bandwidth and directions measured on the first batch.

Published thresholds and bandwidths belong to one scale of pre-activations. Measured quantiles
belong to the user's own layer, so one recipe transfers, and training starts near its target L0,
where the sparse step is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jumprelu_plugin.control.decoder_norm import normalize_rows_
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess

# Of the pre-activations' standard deviation: two that are closer are one token's.
SAME = 1e-5
# Of the mean variance along a direction: much less is none, and latents that read it learn nothing.
STILL = 1e-4


@dataclass(frozen=True)
class Calibration:
    """Numbers a training starts from.

    Attributes:
        threshold: θ₀ of each latent, [d_sae].
        bandwidth: ε, in the units of the pre-activations.
    """

    threshold: Float[Tensor, " d_sae"]
    bandwidth: float


@torch.no_grad()
def calibrate(
    z: Float[Tensor, "batch d_sae"],
    start_l0: float,
    jumprelu_bandwidth_std: float,
    processes: OneProcess = ONE_PROCESS,
) -> Calibration:
    """θ₀ at the quantile of each latent that makes `start_l0` latents active, ε from z's spread.

    Args:
        z: pre-activations of one batch at initialisation.
        start_l0: how many latents of a token should be active at the start, of those in z.
        jumprelu_bandwidth_std: ε as a multiple of the standard deviation of z.
        processes: that hold the dictionary, whose spread decides; z is of this one's latents.

    Raises:
        ValueError: the pre-activations are not finite, or all the same.
    """
    if not torch.isfinite(z).all():
        raise ValueError(
            "the first batch gave pre-activations that are NaN or infinite; check the activations "
            "of the hook, and that the model runs in a dtype that can hold them"
        )
    if (z == z[:1]).all():
        raise ValueError("the first batch's activations are all the same: nothing to learn from")
    spread = processes.std(z)
    batch, d_sae = z.shape
    share = min(0.5, start_l0 / d_sae)
    rank = min(max(1, round(share * batch)), batch - 1)
    # Between two pre-activations: on one, the order of a sum would decide which side it is on. A
    # token that the batch holds twice has one pre-activation, up to rounding.
    above = z.topk(rank, dim=0, sorted=True).values[-1]
    apart = z < above - SAME * spread
    below = z.masked_fill(~apart, -torch.inf).amax(0)
    threshold = 0.5 * (above + torch.maximum(below, above - spread)).clamp_min(0.0)
    return Calibration(threshold, jumprelu_bandwidth_std * spread)


@torch.no_grad()
def soft_whitening(centered: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "d_in d_in"]:
    """(C/c + 1)^(-1/2), C the data's covariance and c its mean eigenvalue; symmetric. 0 along what
    has no variance.

    Multiplied by it, no direction counts for much more than the mean one. A random direction reads
    every principal direction alike, so where one holds half of the variance, every latent starts by
    firing on that one. Training then has to free nearly all latents of it, and those lose their
    spread, their thresholds and their lives: on a layer of Gemma 3, 850 of 2,048 were dead at once,
    and 140 with directions that were multiplied by this (docs/ablations.md).

    Args:
        centered: a batch without its center and its outliers.
    """
    covariance = centered.t() @ centered / len(centered)
    variances, axes = torch.linalg.eigh(covariance)
    mean = variances.mean().clamp_min(torch.finfo(variances.dtype).tiny)
    relative = variances.clamp_min(0.0) / mean
    soft = (relative + 1.0).rsqrt() * (relative / (relative + STILL)).sqrt()
    return axes * soft @ axes.t()


@torch.no_grad()
def raise_to_fire(
    z: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], share: float
) -> Float[Tensor, " d_sae"]:
    """What to add to each latent's bias so that it fires on this share of the tokens.

    The share is held between one token and all but one.
    """
    firing = min(max(1, round(share * len(z))), len(z) - 1)
    below = z.kthvalue(len(z) - firing, dim=0).values
    above = z.kthvalue(len(z) - firing + 1, dim=0).values
    return threshold - 0.5 * (below + above)


@torch.no_grad()
def output_directions(
    z: Float[Tensor, "batch d_sae"],
    threshold: Float[Tensor, " d_sae"],
    centered: Float[Tensor, "batch d_out"],
) -> tuple[Float[Tensor, "d_sae d_out"], Bool[Tensor, " d_sae"]]:
    """Where a transcoder's decoder rows start: along the mean output where their latent fires.

    Random rows point nowhere in particular, and unit rows cannot start at zero.

    Args:
        centered: the target less its mean.

    Returns:
        Unit rows, and which latents fire on this batch; the rows of the others are zero.
    """
    rows = (z * (z > threshold)).t() @ centered
    fires = rows.norm(dim=1) > 0
    normalize_rows_(rows)
    return rows, fires
