"""Schedules and windows that do not fit into the run: repaired where the intent is clear.

Looks at SAELens' runner config alone. What `saes.config.check` and SAELens refuse themselves is not
looked at again.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from jumprelu_plugin.control.learning_rate import HIGHEST_OF_TRANSCODERS, learning_rate
from jumprelu_plugin.control.resampling import patience
from jumprelu_plugin.saes.resolved import ROOM_FOR_DENSITY
from jumprelu_plugin.training.health.findings import Finding

# Share of a run that warm-up and decay are shortened to where they do not fit into it.
REPAIRED_SHARE = 0.5
# A rate that is so many times the measured one, or that part of it, gets a warning: half or twice
# costs 2 to 9 % of FVU in a run of 1,000 steps.
LR_RATIO = 3.0
# A latent that fires less often in the whole run has hardly learnt anything.
FEWEST_FIRINGS = 100


def total_steps(cfg: Any) -> int:
    """Steps as SAELens' schedulers count them."""
    return cfg.training_tokens // cfg.train_batch_size_tokens


def steps_taken(cfg: Any) -> int:
    """Steps that the trainer takes: the last one is that in which the last token is trained on."""
    return -(-cfg.training_tokens // cfg.train_batch_size_tokens)


def repaired(cfg: Any) -> tuple[Any, list[Finding]]:
    """A config whose schedules fit into its run, and what was changed.

    The config that is handed in stays as it is; it is returned if there is nothing to repair.
    """
    steps = total_steps(cfg)
    warm_up, decay, of_lr = fitting_lr_schedule(cfg.lr_warm_up_steps, cfg.lr_decay_steps, steps)
    sae, of_l0 = with_fitting_l0_warm_up(cfg.sae, steps)
    findings = [*of_lr, *of_l0]
    if not findings:
        return cfg, findings
    # A copy and not dataclasses.replace, which would give the checkpoint folder a second id.
    cfg = copy.copy(cfg)
    cfg.lr_warm_up_steps, cfg.lr_decay_steps, cfg.sae = warm_up, decay, sae
    return cfg, findings


def fitting_lr_schedule(warm_up: int, decay: int, steps: int) -> tuple[int, int, list[Finding]]:
    """`lr_warm_up_steps` and `lr_decay_steps` that fit into a run, and what was changed."""
    if not 0 < steps < warm_up + decay:
        return warm_up, decay, []
    share = REPAIRED_SHARE * steps / (warm_up + decay)
    shorter = int(share * warm_up), int(share * decay)
    finding = Finding(
        "repaired",
        "lr schedule",
        f"lr_warm_up_steps {warm_up:,} and lr_decay_steps {decay:,} do not fit into {steps:,} "
        "steps",
        f"shortened to {shorter[0]:,} and {shorter[1]:,}",
    )
    return *shorter, [finding]


def fitting_l0_warm_up(warm_up: int, steps: int) -> tuple[int, list[Finding]]:
    """`l0_warm_up_steps` of a fixed coefficient that fit into a run, and what was changed."""
    if not 0 < steps < warm_up:
        return warm_up, []
    shorter = int(REPAIRED_SHARE * steps)
    finding = Finding(
        "repaired",
        "l0 warm-up",
        f"l0_warm_up_steps is {warm_up:,} and the run has {steps:,} steps: the coefficient would "
        f"end at {steps / warm_up:.2g} of what was given",
        f"shortened to {shorter:,}",
    )
    return shorter, [finding]


def with_fitting_l0_warm_up(sae: Any, steps: int) -> tuple[Any, list[Finding]]:
    """An SAE's config whose coefficient rises within the run, and what was changed.

    The config that is handed in stays as it is; it is returned if there is nothing to change.
    """
    if getattr(sae, "l0_coefficient", None) is None:
        return sae, []
    shorter, findings = fitting_l0_warm_up(getattr(sae, "l0_warm_up_steps", 0), steps)
    if findings:
        sae = copy.copy(sae)
        sae.l0_warm_up_steps = shorter
    return sae, findings


def schedule_findings(cfg: Any) -> list[Finding]:
    """What the config says about its own run, besides repairs."""
    steps, batch, sae = total_steps(cfg), cfg.train_batch_size_tokens, cfg.sae
    findings = []
    if steps < 1:
        return [
            Finding(
                "refused",
                "length",
                f"training_tokens is {cfg.training_tokens:,}, less than one batch of {batch:,}",
                "raise training_tokens, or lower train_batch_size_tokens",
            )
        ]
    scaled = sae.normalize_activations in ("expected_average_only_in", "covariance_whitening")
    if scaled and cfg.n_batches_for_norm_estimate > steps:
        findings.append(
            Finding(
                "warning",
                "input scale",
                f"the input's scale is measured on {cfg.n_batches_for_norm_estimate:,} batches, "
                f"more than the {steps:,} the run trains on",
                f"set n_batches_for_norm_estimate={min(20, steps)}",
            )
        )
    if cfg.dead_feature_window >= steps:
        acts = getattr(sae, "pre_act_loss_coefficient", None) is not None
        findings.append(
            Finding(
                "warning" if acts else "note",
                "dead window",
                f"dead_feature_window is {cfg.dead_feature_window:,} and the run has {steps:,} "
                "steps: no latent will be counted as dead"
                + (", and pre_act_loss never acts" if acts else ""),
                f"set dead_feature_window={max(1, steps // 5)}",
            )
        )
    return (
        findings + _lr_findings(cfg) + _lr_end_findings(cfg) + _length_findings(sae, steps, batch)
    )


def density_findings(given: Any, resolved: Any) -> list[Finding]:
    """Where the limit of densities that is held is not the one given.

    Args:
        given, resolved: a training config, and what its optional fields mean.
    """
    asked, held = given.max_latent_density, resolved.max_latent_density
    if asked is None or asked == held:
        return []
    mean = given.target_l0 / resolved.d_sae
    limit = "no latent is limited" if held == 1 else f"{held:.3g} is held"
    return [
        Finding(
            "warning",
            "max_latent_density",
            f"max_latent_density is {asked:g}, too near the mean density {mean:.3g} (target_l0 "
            f"over d_sae): {limit}",
            f"give {ROOM_FOR_DENSITY * mean:.3g} or more, or None",
        )
    ]


def _lr_end_findings(cfg: Any) -> list[Finding]:
    end = cfg.lr_end
    if cfg.lr_scheduler_name.lower() != "constant" or end is None:
        return []
    # SAELens fills in lr / 10, which stays where lr is changed later, and the decay ends at 0.
    filled_in = cfg.lr / 10, LanguageModelSAERunnerConfig.lr / 10
    if any(math.isclose(end, meant) for meant in (0.0, cfg.lr, *filled_in)):
        return []
    falls = (
        f"falls to 0 over the last {cfg.lr_decay_steps:,} steps" if cfg.lr_decay_steps else "stays"
    )
    return [
        Finding(
            "warning",
            "lr_end",
            f"lr_end is {end:g}, which SAELens' schedule 'constant' does not read: lr {cfg.lr:g} "
            f"{falls}",
            "set lr_scheduler_name=cosineannealing, or leave lr_end out",
        )
    ]


def usual_learning_rate(cfg: Any) -> float | None:
    """The rule's `lr` for a run of this size, for a transcoder at most its recipe's; None for a run
    that the rule is not for."""
    sae, batch = cfg.sae, cfg.train_batch_size_tokens
    if min(sae.d_in, sae.d_sae, batch, cfg.training_tokens) < 1:  # a run refuses these
        return None
    if cfg.from_pretrained_path:  # weights that are there already want a lower one
        return None
    if not (hasattr(sae, "resolve") and (sae.target_l0 or 0) > 0):
        return None
    if not sae.resolve().standardize_activations:
        return None
    rate = learning_rate(sae.d_in, sae.d_sae, sae.target_l0, batch, total_steps(cfg))
    return min(rate, HIGHEST_OF_TRANSCODERS) if hasattr(sae, "width_out") else rate


def _lr_findings(cfg: Any) -> list[Finding]:
    usual = usual_learning_rate(cfg)
    if usual is None or 1 / LR_RATIO < cfg.lr / usual < LR_RATIO:
        return []
    return [
        Finding(
            "warning",
            "lr",
            f"lr is {cfg.lr:g}; with target_l0, training works in units of the data's own spread, "
            f"where the rule for a run of this size gives {usual:g}",
            f"set lr={usual:g}, as jumprelu train does where none is given",
        )
    ]


def _length_findings(sae: Any, steps: int, batch: int) -> list[Finding]:
    target = getattr(sae, "target_l0", None)
    if target is None:
        return []
    findings = []
    wait, firings = patience(sae.d_sae, target, batch), target * steps * batch / sae.d_sae
    if firings < FEWEST_FIRINGS:
        enough = FEWEST_FIRINGS * sae.d_sae / target
        dead = f"; dead latents are resampled after {wait:,} steps of {steps:,}"
        resamples = hasattr(sae, "resolve") and sae.resolve().resample_dead_latents
        findings.append(
            Finding(
                "warning",
                "length",
                f"at L0 {target:g} a latent of {sae.d_sae:,} fires {firings:.0f} times in the "
                f"whole run{dead if resamples and wait >= steps else ''}",
                f"give training_tokens={enough:,.0f} or more, or a smaller d_sae",
            )
        )
    if target >= sae.d_in:
        findings.append(
            Finding(
                "warning",
                "target_l0",
                f"target_l0 {target:g} is not below d_in {sae.d_in:,}: so many directions rebuild "
                "any activation, and the latents need not mean anything",
                "lower target_l0",
            )
        )
    return findings


def lr_sum(cfg: Any) -> float:
    """The learning rates of all steps, added up: about as far as Adam can move a number."""
    steps, lr = total_steps(cfg), cfg.lr
    constant = cfg.lr_scheduler_name.lower() == "constant"
    # SAELens decays from lr_end, which its constant schedule takes to be lr.
    end = lr if constant or cfg.lr_end is None else cfg.lr_end
    middle = steps - cfg.lr_warm_up_steps - cfg.lr_decay_steps
    return 0.5 * (lr * cfg.lr_warm_up_steps + (lr + end) * middle + end * cfg.lr_decay_steps)
