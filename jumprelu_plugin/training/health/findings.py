"""What a measured first step and a memory forecast mean for a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import logger
from torch import Tensor

from jumprelu_plugin.training.health.first_step import DOMINANCE, FirstStep, ThresholdReach
from jumprelu_plugin.training.health.memory import MemoryForecast, size

# `refused`: the run cannot do what it is for. `repaired`: it has been changed so that it can.
# `warning`: it will run, and likely disappoint. `note`: good to know.
Severity = Literal["refused", "repaired", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One fact about a run that should be known before it starts.

    Attributes:
        name: a short, fixed word for it.
        message: what was given or measured, and what follows from it.
        suggestion: what to do.
    """

    severity: Severity
    name: str
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        return f"{self.message}: {self.suggestion}" if self.suggestion else self.message


def log_findings(findings: Iterable[Finding]) -> None:
    """Say each in a line of the log."""
    for finding in findings:
        logger.warning(f"{finding.name} ({finding.severity}): {finding}")


# Gradients a threshold needs in a run to get anywhere, and how seldom they may come.
FEWEST_TOKENS = 10
FEWEST_TOKENS_A_STEP = 0.1
# Above this share of tokens, a window says nothing about where its threshold is.
WIDEST_OCCUPANCY = 0.6
# Shares of the memory there is.
MEMORY_WARNING = 0.8
# Thresholds that are all pushed one way, whatever they decide.
ONE_SIDED = 0.95
# L0 that thresholds cannot change by more than this does not depend on them.
L0_STAYS = 1.2

_CHANGES = {
    "optimizer": "a smaller d_sae",
    "buffer": "a smaller n_batches_in_buffer",
    "drawing": "a smaller n_batches_in_buffer or store_batch_size_prompts",
    "calibration": "a smaller train_batch_size_tokens, or jumprelu_bandwidth and "
    "jumprelu_init_threshold given",
    "step": "a smaller train_batch_size_tokens, or step_kernel=sparse",
    "saving": "save_buffer=False (--no_save_buffer), or a smaller n_batches_in_buffer",
    "joining": "a smaller d_sae, or more memory for the first process,",
}


def memory_findings(memory: MemoryForecast) -> list[Finding]:
    """Whether a run fits."""
    if memory.available is None or memory.peak < MEMORY_WARNING * memory.available:
        return []
    part = memory.largest()
    what = "the run will take {} on {} at its peak"
    if memory.moment == "joining":
        what = "the first process will take {} on {} while it saves the whole dictionary"
    return [
        Finding(
            "refused" if memory.peak > memory.available else "warning",
            "memory",
            f"{what.format(size(memory.peak), memory.device)}, and "
            f"{size(memory.available)} can be had (largest part: {part})",
            f"{_CHANGES[part]} helps most; check_first=False (--no_check_first) tries it anyway",
        )
    ]


def first_step_findings(
    sae: Any, found: FirstStep, cfg: Any, reach: ThresholdReach
) -> list[Finding]:
    """What a first step says about a run of SAELens' config `cfg`."""
    return [
        *_window_findings(sae, found, cfg),
        *_target_findings(sae, found, reach),
        *_coefficient_findings(sae, found),
    ]


def _window_findings(sae: Any, found: FirstStep, cfg: Any) -> list[Finding]:
    in_a_step = found.occupancy * cfg.train_batch_size_tokens
    in_the_run = found.occupancy * cfg.training_tokens
    window = f"the window of width {found.bandwidth / found.unit:.3g}"
    wide = f"jumprelu_bandwidth={found.spread / found.unit:.2g} (the spread of the "
    advice = f"set {wide}pre-activations), or leave it out in our config"
    # The controller's steps end at the window's edge, so a narrow one holds it back too.
    if in_the_run < FEWEST_TOKENS:
        return [
            Finding(
                "refused",
                "window",
                f"a threshold gets a gradient from {in_the_run:.2g} tokens in the whole run: "
                f"{window} holds {found.occupancy:.2g} of them",
                advice,
            )
        ]
    if in_a_step < FEWEST_TOKENS_A_STEP:
        return [
            Finding(
                "warning",
                "window",
                f"a threshold gets a gradient in one of {1 / in_a_step:,.0f} steps: {window} holds "
                f"{found.occupancy:.2g} of the tokens",
                advice,
            )
        ]
    if found.occupancy > WIDEST_OCCUPANCY:
        return [
            Finding(
                "warning",
                "window",
                f"{window} holds {found.occupancy:.0%} of the tokens: the gradient of a threshold "
                "hardly depends on where it is",
                advice,
            )
        ]
    return []


def _target_findings(sae: Any, found: FirstStep, reach: ThresholdReach) -> list[Finding]:
    target, shift = sae.cfg.target_l0, found.target_shift
    if target is None or shift is None:
        low, high = found.l0_in_reach
        if high <= L0_STAYS * max(low, 1e-9):
            return [_stays(found, reach)]
        return []
    if target > found.most_l0:
        return [
            Finding(
                "refused",
                "target_l0",
                f"target_l0 is {target:g}, and with every threshold at 0 only {found.most_l0:.1f} "
                "latents are active",
                f"set target_l0 below {found.most_l0:.0f}, or raise d_sae",
            )
        ]
    can = (reach.up if shift > 0 else reach.down) + reach.shift
    if abs(shift) <= max(can, 0.1 * found.spread):
        return []
    return [
        Finding(
            "warning",
            "threshold_reach",
            f"L0 is {found.l0:.1f} at the start; thresholds have to move by {shift:+.3g} for "
            f"{target:g}, and can move by {can:.2g} in this run (learning rate times steps"
            f"{', and the controller' if reach.shift else ''})",
            "leave out jumprelu_init_threshold and jumprelu_bandwidth in our config, train longer, "
            "or raise lr",
        )
    ]


def _stays(found: FirstStep, reach: ThresholdReach) -> Finding:
    low, high = found.l0_in_reach
    return Finding(
        "warning",
        "threshold_reach",
        f"thresholds can move by {reach.up / found.spread:.2g} spreads of the pre-activations in "
        f"this run (learning rate times steps), which gives an L0 of {low:.1f} to {high:.1f}: "
        "whatever l0_coefficient is, L0 is left to the encoder",
        "give target_l0 in place of l0_coefficient, raise lr, or train longer",
    )


def _coefficient_findings(sae: Any, found: FirstStep) -> list[Finding]:
    coefficient, mode = sae.cfg.l0_coefficient, sae.cfg.jumprelu_sparsity_loss_mode
    if coefficient is None or mode == "quadratic":
        return []
    if mode == "step" and coefficient >= found.variance:
        return [
            Finding(
                "refused",
                "l0_coefficient",
                f"l0_coefficient is {coefficient:g}, and a latent that explained all of an "
                f"activation would save {found.variance:.3g}: the least loss is at L0 0",
                # Switching every latent off costs the variance, so no L0 above variance / λ pays.
                f"set it well below {found.variance / 50:.2g}, above which no L0 of 50 can pay, or "
                "give target_l0 in its place",
            )
        ]
    low, high = found.l0_in_reach
    if (found.penalty_dominates or 0.0) > ONE_SIDED:
        return [
            Finding(
                "warning",
                "l0_coefficient",
                f"l0_coefficient {coefficient:g} pulls at {found.penalty_dominates:.0%} of the "
                f"thresholds over {DOMINANCE:.0f} times as hard as the error does, and Adam's "
                "steps are no longer for that: a larger one changes nothing. Thresholds rise "
                f"as far as the learning rate takes them: to an L0 of {low:.1f} if the encoder "
                "stayed",
                "lower it tenfold until this is not said, or give target_l0 in its place",
            )
        ]
    if (found.error_dominates or 0.0) > ONE_SIDED:
        return [
            Finding(
                "warning",
                "l0_coefficient",
                f"l0_coefficient {coefficient:g} pulls at {found.error_dominates:.0%} of the "
                f"thresholds less than a {DOMINANCE:.0f}th as hard as the error does: it is as "
                f"good as 0, and L0 ({found.l0:.1f} at the start, {high:.1f} in reach) is left to "
                "the error",
                "raise l0_coefficient, or give target_l0 in its place",
            )
        ]
    return []


def precision_findings(sae: Any, lr: float, found: FirstStep | None) -> list[Finding]:
    """What an SAE in half precision loses."""
    if sae.dtype not in (torch.bfloat16, torch.float16):
        return []
    name, findings = str(sae.dtype).removeprefix("torch."), []
    lost = lost_share(sae.W_enc.detach(), lr)
    if lost > 0:
        findings.append(
            Finding(
                "refused" if lost > 0.5 else "warning",
                "precision",
                f"the SAE's weights are {name}, and a step of lr {lr:g} is lost in rounding for "
                f"{lost:.0%} of its encoder",
                "train the SAE in float32 (dtype in its config, --sae.dtype)",
            )
        )
    if found is not None and found.rounding > 0.5 * found.bandwidth:
        findings.append(
            Finding(
                "warning",
                "precision",
                f"rounding activations to {name} moves pre-activations by {found.rounding:.2g}, "
                f"more than half the window of {found.bandwidth:.2g}: which tokens train a "
                "threshold is chance",
                "train the SAE in float32, or raise jumprelu_bandwidth",
            )
        )
    return findings


def lost_share(weights: Float[Tensor, "..."], step: float) -> float:
    """Share of numbers that adding `step` leaves as they are, in their own precision."""
    moved = (weights + step) != weights
    moved |= (weights - step) != weights
    return 1.0 - moved.float().mean().item()
