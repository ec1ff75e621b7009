"""The refusal of a step that is not finite, before it reaches the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from jumprelu_plugin.step.readback import Readback


class FiniteCheck:
    """Whether a step's loss, biases and thresholds are finite: read when called, not before.

    Args:
        dictionaries: with b_enc and threshold, [d_sae].
        activations: what the step read, by the name of its hook.
        step: the number of the training step, for the message.
        input_remedy: what to do about activations that are not finite.
        remedy: what to do about a training that diverged.
    """

    def __init__(
        self,
        loss: Tensor,
        dictionaries: Iterable[Any],
        activations: Mapping[str, Tensor],
        step: int,
        *,
        input_remedy: str,
        remedy: str,
    ):
        # A latent whose b_enc or θ is NaN is selected nowhere, and the loss would not show it.
        vectors = sum(d.b_enc.detach().sum() + d.threshold.detach().sum() for d in dictionaries)
        loss = loss.detach()
        self._read = Readback(torch.stack((loss, loss + 0 * vectors)))
        self._activations, self._step = activations, step
        self._input_remedy, self._remedy = input_remedy, remedy

    def __call__(self) -> None:
        """Raise ValueError for a loss, a bias or a threshold that is NaN or infinite."""
        loss, with_vectors = self._read.tolist()
        if math.isfinite(with_vectors):
            return
        for name, values in self._activations.items():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"the activations of {name} hold NaN or infinite values (training step "
                    f"{self._step}); {self._input_remedy}"
                )
        raise ValueError(
            f"the loss became {loss} at training step {self._step} though the activations of "
            f"{', '.join(self._activations)} are finite: the training diverged; {self._remedy}"
        )


class LastCheck:
    """The check of the last step, which may not be read yet."""

    def __init__(self) -> None:
        self._check: FiniteCheck | None = None

    def begin(self, check: FiniteCheck, *, later: bool) -> None:
        """Read the check now, or when `finish` is called."""
        self._check = check
        if not later:
            self.finish()

    def finish(self) -> None:
        """Read the check, if it was not: raises what it raises."""
        check, self._check = self._check, None
        if check is not None:
            check()
