"""L0 control: hold the target L0, and measure the sparsity coefficient that belongs to it.

Training to a target is a constrained problem: least reconstruction error, subject to a mean L0 of
L0*. Both unknowns are measured on every batch, with the kernel density estimate that the
thresholds' own gradients use (arXiv 2407.14435, section 4), so nothing is tuned and nothing lags.

**The constraint.** Raising every threshold by s changes the mean L0 at the rate -Σ_i p_i(θ_i), the
density of pre-activations at the thresholds. Newton's step on that,

    s = (L0 - L0*) / Σ_i p_i(θ_i),

is taken partly after each update of the parameters. What training keeps undoing of it is summed and
applied in advance (a PI controller, overdamped where the estimate is exact). It is in proportion to
the learning rate, so that L0 stays on target while that decays.

**The multiplier.** λ is the Lagrange multiplier of the constraint. At the solution, shifting all
thresholds together changes nothing to first order:

    Σ_i ∂L/∂θ_i + λ Σ_i ∂‖f‖₀/∂θ_i = 0.

Both sums are known after a backward pass, and λ is the ratio of their means over a few batches.
What one batch measures counts as no further from λ than three times the usual size of a
measurement, so no token owns the ratio. With a smaller λ the loss pulls all thresholds down while
the constraint pushes them up, and in between the estimators' gradient to the encoder inflates every
pre-activation: on a small language model's residual stream (256 wide, 2,048 latents, L0 32, 500
steps at lr 1e-3) FVU was 0.43 at λ = 0.09 and 0.21 at the multiplier, 0.76.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Scalar = Float[Tensor, ""]

# Times the usual size of a measurement; what one batch measures counts as no further from λ. On a
# language model's activations batches of 1,024 tokens measure 0.4 to 2.4 times λ.
FURTHEST_MEASUREMENT = 3.0
# Share of the gain that is left at a learning rate of 0: thresholds then follow about the last
# twelve batches, where the full gain follows the last three and their noise: with batches of 512
# tokens that left L0 2 % off at the end of a run. A lower share loses data that drift.
LEAST_GAIN = 0.25
_MEANS = ("others", "penalty", "size", "unmeasured", "drift")


@dataclass
class L0Controller:
    """Holds a target L0 by shifting thresholds, and measures the constraint's multiplier.

    Everything stays on the device of the step: no value is read back to the host.

    Attributes:
        target: L0*, active latents a token.
        start_ratio, warm_up_steps: the target begins at `start_ratio` · L0* and falls to L0*
            geometrically over the first `warm_up_steps` steps. Latents that are tried more often at
            first find their features sooner.
        gain: share of Newton's step that is taken. It falls with the learning rate: where training
            moves little, there is little to correct, and what is left is a batch's noise.
        integral_gain: share of it that is added to `drift`.
        drift: the shift that a step of training calls for when L0 is on target.
        smoothing: weight of the newest batch in the running means that give λ.
        others, penalty: those means, of Σ_i ∂/∂θ_i of the loss without its penalty and of the
            penalty.
        size: the mean of their ratio's absolute value, a batch's at most `FURTHEST_MEASUREMENT`
            times the mean before.
        unmeasured: the share of the latest batches, by the same means, in which the loss would
            raise the thresholds by itself, so that they say nothing about λ.
        lr, peak_lr: the learning rate that `drift` belongs to, and the highest so far; 0: none yet.
        steps: batches seen.
    """

    target: float
    start_ratio: float = 1.0
    warm_up_steps: int = 0
    gain: float = 0.3
    integral_gain: float = 0.02
    smoothing: float = 0.05
    others: Scalar = field(default_factory=lambda: torch.zeros(()))
    penalty: Scalar = field(default_factory=lambda: torch.zeros(()))
    size: Scalar = field(default_factory=lambda: torch.zeros(()))
    unmeasured: Scalar = field(default_factory=lambda: torch.zeros(()))
    drift: Scalar = field(default_factory=lambda: torch.zeros(()))
    lr: float = 0.0
    peak_lr: float = 0.0
    steps: int = 0

    @property
    def coefficient(self) -> Scalar:
        """λ, in the units the loss is trained in; 0 until it is first measured."""
        multiplier = (-self.others / self.penalty).clamp_min(0.0)
        # No entry in any window yet: nothing was measured.
        return torch.where(self.penalty == 0, torch.zeros_like(multiplier), multiplier)

    def current_target(self) -> float:
        """The L0 to hold now."""
        warm_up = self.warm_up_steps
        left = max(0.0, 1.0 - self.steps / warm_up) if warm_up else 0.0
        return self.target * self.start_ratio**left

    def furthest_shift(self, bandwidth: float) -> float:
        """The largest shift of one step."""
        return 0.5 * self.gain * bandwidth

    def shift(self, l0: float, slope: Scalar, bandwidth: float) -> Scalar:
        """How far to raise every threshold after this step, in their units.

        Args:
            l0: the batch's mean L0.
            slope: Σ_i ∂l0/∂θ_i by the estimator, ≤ 0.
            bandwidth: ε. The estimate says nothing beyond ε/2, so no step goes further.
        """
        self.steps += 1
        excess = l0 - self.current_target()
        # An empty window means a slope of 0 and a step as far as it may go.
        newton = excess / slope.abs().clamp_min(torch.finfo(slope.dtype).tiny)
        newton = newton.clamp(-0.5 * bandwidth, 0.5 * bandwidth)
        newton *= self._gain_left()
        shift = self.gain * newton + self.drift.to(newton.device)
        furthest = self.furthest_shift(bandwidth)
        drift = self.drift.to(newton.device) + self.integral_gain * newton
        self.drift = drift.clamp(-furthest, furthest)
        return shift.clamp(-furthest, furthest)

    def _gain_left(self) -> float:
        return max(LEAST_GAIN, self.lr / self.peak_lr) if self.peak_lr > 0 else 1.0

    def follow(self, lr: float) -> None:
        """Scale `drift` with the learning rate: training undoes a step's shift in proportion."""
        if self.lr > 0 and lr < self.lr:
            self.drift = self.drift * (lr / self.lr)
        self.lr, self.peak_lr = lr, max(lr, self.peak_lr)

    def update_multiplier(self, others: Scalar, penalty: Scalar) -> None:
        """Take in one batch's sums, from which λ follows.

        Args:
            others: Σ_i ∂/∂θ_i of the loss without its sparsity penalty.
            penalty: Σ_i ∂/∂θ_i of the penalty, before its coefficient.
        """
        others, penalty = others.detach(), penalty.detach()
        size, known = self.size.to(penalty), self.coefficient.to(penalty)
        # The first measurement counts in full, and so does the first after an empty window.
        weight = torch.where(self.penalty.to(penalty) == 0, 1.0, self.smoothing)
        measured = others.abs() / penalty.abs().clamp_min(torch.finfo(penalty.dtype).tiny)
        most = FURTHEST_MEASUREMENT * size
        self.size = torch.lerp(
            size, torch.where(size == 0, measured, measured.minimum(most)), weight
        )
        expected = -known * penalty
        furthest = torch.where(size == 0, others.abs(), most * penalty.abs())
        counted = others.clamp(expected - furthest, expected + furthest)
        self.others = torch.lerp(self.others.to(penalty), counted, weight)
        self.penalty = torch.lerp(self.penalty.to(penalty), penalty, weight)
        negative = (others <= 0).to(penalty)
        self.unmeasured = torch.lerp(self.unmeasured.to(penalty), negative, self.smoothing)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON's types."""
        values = {name: float(getattr(self, name)) for name in _MEANS}
        return {**values, "lr": self.lr, "peak_lr": self.peak_lr, "steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        for name in _MEANS:
            setattr(self, name, torch.tensor(state[name]))
        self.lr, self.peak_lr, self.steps = state["lr"], state["peak_lr"], state["steps"]
