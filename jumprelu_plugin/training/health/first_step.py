"""What the first step of a training would do, measured on a copy of its SAE.

The copy is calibrated and stepped as the training's own SAE will be, on real activations, and then
thrown away. What is read off it: how many tokens lie in the thresholds' windows, what the
reconstruction and the penalty each ask of the thresholds, and which L0 any shift of them can give.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from jumprelu_plugin.control.dictionary_control import keep_thresholds_positive_
from jumprelu_plugin.control.units import LogParameter, parametrized, stored
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.step.choose import PathChoice
from jumprelu_plugin.step.estimators import in_window

# Pre-activations that are looked at together: 16 MB in float32, so that the look never takes more
# than the run will.
_PAIRS = 2**22
# Above this density the dense step is the smaller one.
_DENSE_ABOVE = 0.1

# Of two pulls on a threshold, one that is so many times the other decides alone.
DOMINANCE = 10.0


@dataclass(frozen=True)
class FirstStep:
    """A first step, measured. θ, ε and z are in the units of the activations.

    Attributes:
        unit: what one of the config's units of θ and ε is in them.
        tokens: looked at.
        spread: standard deviation of z over tokens and latents.
        threshold: median θ.
        bandwidth: ε.
        l0: active latents a token.
        most_l0: the same with every threshold at 0.
        l0_in_reach: L0 with every threshold as far up, and as far down, as `threshold_reach` says.
        target_shift: the shift of all thresholds together that gives the target, or None.
        occupancy: share of tokens in a latent's window, mean over latents.
        median_occupancy: the same for the median latent.
        entries: pairs above the window's lower edge, a token.
        variance: E‖y - E y‖² of what is rebuilt, in the config's units of the loss.
        penalty_dominates, error_dominates: shares of latents whose threshold a fixed λ pulls at
            least ten times as hard as the reconstruction does, and the other way round; None if λ
            is not fixed or no window holds a token.
        rounding: root mean square of what rounding the input to the SAE's dtype does to z.
    """

    unit: float
    tokens: int
    spread: float
    threshold: float
    bandwidth: float
    l0: float
    most_l0: float
    l0_in_reach: tuple[float, float]
    target_shift: float | None
    occupancy: float
    median_occupancy: float
    entries: float
    variance: float
    penalty_dominates: float | None
    error_dominates: float | None
    rounding: float


@dataclass(frozen=True)
class ThresholdReach:
    """How far a threshold can get in a run, by Adam's steps of about the learning rate.

    Attributes:
        up, down: from the median threshold; in the units of z.
        shift: what the L0 controller can add either way; 0 with a fixed coefficient.
    """

    up: float
    down: float
    shift: float = 0.0


def threshold_reach(
    sae: JumpReLUTrainingSAE, threshold: float, bandwidth: float, lr_sum: float, steps: int
) -> ThresholdReach:
    """How far `threshold` can get.

    Args:
        lr_sum: the learning rates of all steps, added up.
    """
    if isinstance(parametrized(sae, "threshold"), LogParameter):
        grown = torch.tensor(lr_sum, dtype=torch.float64).exp().item()
        up, down = threshold * (grown - 1.0), threshold * (1.0 - 1.0 / grown)
    else:
        up = sae.units.activation * lr_sum
        down = min(up, threshold)  # never below 0
    controller = sae.control.l0
    furthest = 0.0 if controller is None else controller.furthest_shift(bandwidth) * steps
    return ThresholdReach(up, down, furthest)


def first_step(
    sae: JumpReLUTrainingSAE, rows: Float[Tensor, "tokens width"], lr_sum: float, steps: int
) -> FirstStep:
    """Measure the first step of `sae` on scaled activations; `sae` is left as it is.

    Args:
        rows: what a batch of the training holds: its calibration sees all of them, the rest of this
            as many as 16 MB of pre-activations allow.
        lr_sum, steps: see `threshold_reach`.

    Raises:
        ValueError: the activations are not finite, or all the same.
    """
    trial = copy.deepcopy(sae).eval()
    trial.calibrate_if_needed(rows)
    keep_thresholds_positive_(trial)
    # Its coefficient is wanted as the config has it, and nothing else of the trial is trained.
    trial.control.disable_feedback()
    for parameter in trial.parameters():
        parameter.requires_grad_(parameter is stored(trial, "threshold"))
    rows = rows[: max(64, _PAIRS // trial.cfg.d_sae)]
    z, rounding, variance = _pre_activations(trial, rows)
    theta, bandwidth = trial.threshold.detach(), trial.control.bandwidth
    assert bandwidth is not None
    inside = in_window(z, theta, bandwidth).float().mean(0)
    fidelity, penalty = _pulls(
        trial, rows, dense=_mean_active(z, theta) > _DENSE_ABOVE * len(theta)
    )
    penalty_dominates = error_dominates = None
    pressed = penalty != 0
    if sae.cfg.l0_coefficient is not None and pressed.any():
        pull = sae.cfg.l0_coefficient * penalty[pressed].abs()
        other = fidelity[pressed].abs()
        penalty_dominates = (pull > DOMINANCE * other).float().mean().item()
        error_dominates = (other > DOMINANCE * pull).float().mean().item()
    median = theta.median().item()
    reach = threshold_reach(trial, median, bandwidth, lr_sum, steps)
    log = isinstance(parametrized(sae, "threshold"), LogParameter)
    factor = 1.0 + reach.up / median if log else 1.0
    highest = theta * factor if log else theta + reach.up
    lowest = theta / factor if log else (theta - reach.up).clamp_min(0.0)
    target = sae.cfg.target_l0
    return FirstStep(
        unit=trial.units.activation,
        tokens=len(rows),
        spread=z.std().item(),
        threshold=median,
        bandwidth=bandwidth,
        l0=_mean_active(z, theta),
        most_l0=_mean_active(z, torch.zeros_like(theta)),
        l0_in_reach=(_mean_active(z, highest), _mean_active(z, lowest)),
        target_shift=None if target is None else _shift_to(target, z, theta),
        occupancy=inside.mean().item(),
        median_occupancy=inside.median().item(),
        entries=_mean_active(z, theta - 0.5 * bandwidth),
        variance=variance / trial.units.loss,
        penalty_dominates=penalty_dominates,
        error_dominates=error_dominates,
        rounding=rounding,
    )


@torch.no_grad()
def _pre_activations(
    trial: JumpReLUTrainingSAE, rows: Tensor
) -> tuple[Float[Tensor, "tokens d_sae"], float, float]:
    """z, what rounding the input does to it, and the variance of the target."""
    source, target = trial.input_and_target(rows)
    x = trial.normalized_input(source).float()
    lost = source.float() - source.to(trial.dtype).float()
    if trial.cfg.apply_b_dec_to_input:
        x = x - trial.b_dec.float()
    W_enc = trial.W_enc.float()
    rounding = 0.0
    if lost.any():
        rounding = (lost[:256] @ W_enc).square().mean().sqrt().item()
    target = target.float()
    variance = (target - target.mean(0)).square().sum(1).mean().item()
    return torch.addmm(trial.b_enc.float(), x, W_enc), rounding, variance


def _pulls(
    trial: JumpReLUTrainingSAE, rows: Tensor, dense: bool
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """∂/∂θ of the reconstruction error, and of the penalty before its coefficient."""
    trial.path_choice = PathChoice("dense" if dense else "sparse")
    output = trial.training_forward_pass(
        step_input=TrainStepInput(
            sae_in=rows,
            dead_neuron_mask=None,
            coefficients={"l0": 1.0},
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    seen = stored(trial, "threshold")
    slope = torch.autograd.grad(trial.threshold.sum(), seen)[0]
    by_name = (
        torch.autograd.grad(output.losses[name], seen, retain_graph=True)[0] / slope  # type: ignore[arg-type]
        for name in ("mse_loss", "l0_loss")
    )
    fidelity, penalty = by_name
    return fidelity, penalty


def _mean_active(z: Float[Tensor, "tokens d_sae"], theta: Float[Tensor, " d_sae"]) -> float:
    return (z > theta).sum().item() / len(z)


def _shift_to(
    target: float, z: Float[Tensor, "tokens d_sae"], theta: Float[Tensor, " d_sae"]
) -> float:
    """The shift of all thresholds that makes `target` latents active, thresholds kept above 0."""
    above = (z - theta).flatten()
    above[(z <= 0).flatten()] = -torch.inf  # no threshold reaches these
    wanted = min(max(1, round(target * len(z))), above.numel())
    return above.kthvalue(above.numel() - wanted + 1).values.item()
