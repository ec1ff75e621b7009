"""The refusal of a step that is not finite, before it reaches the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def require_finite(
    loss: Tensor,
    dictionaries: Iterable[Any],
    activations: Mapping[str, Tensor],
    step: int,
    *,
    input_remedy: str,
    remedy: str,
) -> None:
    """Raise ValueError for a loss, a bias or a threshold that is NaN or infinite.

    Args:
        dictionaries: with b_enc and threshold, [d_sae].
        activations: what the step read, by the name of its hook.
        step: the number of the training step, for the message.
        input_remedy: what to do about activations that are not finite.
        remedy: what to do about a training that diverged.
    """
    # A latent whose b_enc or θ is NaN is selected nowhere, and the loss would not show it.
    vectors = sum(d.b_enc.detach().sum() + d.threshold.detach().sum() for d in dictionaries)
    if torch.isfinite(loss.detach() + 0 * vectors):
        return
    for name, values in activations.items():
        if not torch.isfinite(values).all():
            raise ValueError(
                f"the activations of {name} hold NaN or infinite values (training step {step}); "
                f"{input_remedy}"
            )
    raise ValueError(
        f"the loss became {loss.item()} at training step {step} though the activations of "
        f"{', '.join(activations)} are finite: the training diverged; {remedy}"
    )
