"""Closed-loop L0: steer the sparsity coefficient until the measured L0 holds the target.

The L0 a coefficient leads to depends on layer, width, learning rate and data, and answers late. The
controller works in logarithms, where the answer is closest to linear: with e = log(L0 / L0*),

    log λ  ←  log λ + k_i e + k_p (e - e_previous)
    θ      ←  θ · exp(k_θ e)

The integral term finds the λ that holds the target, the proportional term on the change of e damps
the overshoot the delay would cause. λ acts through the learning rate, so it answers late, and not
at all once the rate has decayed; the trim of the thresholds acts at once and lands the rest. At
the λ that holds the target, the trim has nothing to do. L0 is averaged over a few steps first,
against batch noise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class L0Controller:
    """A PI controller of log λ on log L0.

    Attributes:
        target: L0*, active latents a token.
        coefficient: λ, in the units the loss is trained in.
        integral_gain, proportional_gain: k_i per step, and k_p.
        trim_gain: k_θ per step.
        smoothing: weight of the newest batch in the running mean of L0.
        max_rate: largest change of log λ in one step, so that a wild start cannot throw λ away.
        l0: the running mean, None before the first step.
    """

    target: float
    coefficient: float
    integral_gain: float = 0.003
    proportional_gain: float = 0.3
    trim_gain: float = 0.02
    smoothing: float = 0.1
    max_rate: float = 0.02
    l0: float | None = None

    def update(self, l0: float) -> float:
        """Take one batch's mean L0, return the λ of the next step."""
        l0 = max(l0, 1e-3)
        if self.l0 is None:
            self.l0 = l0
        previous = math.log(self.l0 / self.target)
        self.l0 += self.smoothing * (l0 - self.l0)
        error = math.log(self.l0 / self.target)
        change = self.integral_gain * error + self.proportional_gain * (error - previous)
        self.coefficient *= math.exp(max(-self.max_rate, min(self.max_rate, change)))
        return self.coefficient

    def trim(self) -> float:
        """The factor on every threshold after this step."""
        if self.l0 is None:
            return 1.0
        return math.exp(self.trim_gain * math.log(self.l0 / self.target))

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]
        self.l0 = state["l0"]
