"""Refits the thresholds of a trained dictionary to another L0.

Minimizing the error at a mean L0 of L0* is a constrained problem with one unknown per latent. At
its solution, a small increase of any threshold changes the error by the same amount for each
activation that it removes (arXiv 2407.14435, section 4):

    E[I_i | z_i = θ_i] = λ,    I_i = 2 θ_i d_i · (x - x̂).

The thresholds are trained with `JumpReLUTrainingSAE`: the estimators' gradient for θ_i is the
difference of the two sides, and the L0 controller holds L0* and measures λ. Before and after the
training, one shift of all thresholds sets the L0 to L0* exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin.finetune.pretrained import decoder_norms, load_parameters_, rescale
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.parameters import Parameters

# The parameters that each value of `RefitSettings.train` trains.
TRAINED_PARAMETERS = {
    "thresholds": ("threshold",),
    "decoder": ("threshold", "W_dec", "b_dec"),
    "all": ("threshold", "W_dec", "b_dec", "W_enc", "b_enc"),
}
# Adam's, for what is trained; docs/ablations.md has what they gave.
LEARNING_RATES = {"thresholds": 1e-2, "decoder": 3e-3, "all": 3e-3}
# L0 is measured on at most this many tokens; its standard error is then about 0.3 %.
L0_TOKENS = 32_768
# Tokens whose pre-activations exist at one time.
_TOKENS_PER_ENCODE = 1024


@dataclass(frozen=True)
class RefitSettings:
    """Settings of the training at each L0.

    Attributes:
        train: `thresholds` only; `decoder`, for thresholds and decoder; or `all`, which adds the
            encoder.
        steps: training steps; 0 only shifts the thresholds.
        batch_tokens: tokens in a step.
        lr: Adam's learning rate, for activations scaled to E‖x‖ = √d_in. It falls to 0 over the
            second half of the steps. None stands for `LEARNING_RATES[train]`.
        seed: seed of the order of the tokens.
        device: where the training runs.
    """

    train: str = "thresholds"
    steps: int = 300
    batch_tokens: int = 2048
    lr: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.train not in TRAINED_PARAMETERS:
            raise ValueError(
                f"train is {self.train!r}; it must be one of {', '.join(TRAINED_PARAMETERS)}"
            )
        if self.steps < 0 or self.batch_tokens < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"steps is {self.steps}, batch_tokens {self.batch_tokens} and lr "
                f"{self.learning_rate}; expected steps of 0 or more, at least one token, and a "
                "positive lr"
            )

    @property
    def learning_rate(self) -> float:
        """`lr`, or its default for what is trained."""
        return LEARNING_RATES[self.train] if self.lr is None else self.lr


def refit_to_each(
    parameters: Parameters,
    targets: Sequence[float],
    activations: Float[Tensor, "tokens d_in"],
    settings: RefitSettings,
    before_each: Callable[[float], None] = lambda target: None,
) -> Iterator[tuple[float, Parameters]]:
    """Refit the dictionary to every L0 of `targets`, and yield each with its parameters.

    The targets below the dictionary's L0 come first, in descending order, then those above it, in
    ascending order. Each refit starts from the one before.

    Args:
        parameters: a dictionary on raw activations.
        targets: the L0s.
        activations: raw activations to fit on, in random order.
        settings: settings of each training.
        before_each: called with each target before its refit.

    Raises:
        ValueError: a target is not a positive number or is given twice, no thresholds reach it on
            these activations, or there are too few activations.
    """
    check_targets(parameters, targets, activations)
    initial_l0 = mean_l0(parameters, activations)
    below = sorted((target for target in targets if target <= initial_l0), reverse=True)
    above = sorted(target for target in targets if target > initial_l0)
    for ordered in (below, above):
        refitted = parameters
        for target in ordered:
            before_each(target)
            refitted = refit(refitted, target, activations, settings)
            yield target, refitted


def refit(
    parameters: Parameters,
    target: float,
    activations: Float[Tensor, "tokens d_in"],
    settings: RefitSettings,
) -> Parameters:
    """The dictionary trained to the least error at L0 `target` on `activations`.

    Parameters that are not trained stay bit-identical. With `train="decoder"`, b_dec is first
    folded into b_enc, so that the encoder does not change with it.

    Raises:
        ValueError: no thresholds reach the target, or there are fewer activations than a batch.
    """
    if settings.train == "decoder":
        parameters = parameters.fold_b_dec()
    start = shift_thresholds(parameters, target, activations)
    if settings.steps == 0:
        return start
    trained = _train(start, target, activations, settings)
    return shift_thresholds(trained, target, activations)


def shift_thresholds(
    parameters: Parameters, target: float, activations: Float[Tensor, "tokens d_in"]
) -> Parameters:
    """The dictionary with all thresholds shifted by one value, so that the mean L0 is `target`.

    The value is the same for each latent's θ_i ‖d_i‖, in units of x̂. A threshold does not fall
    below 0, because pre-activations below 0 give no activation.

    Raises:
        ValueError: the L0 is below the target even with every threshold at 0.
    """
    activations, norms = activations[:L0_TOKENS], decoder_norms(parameters)
    n_active = round(target * len(activations))
    margins = _largest_margins(parameters.fold_decoder_norms(), activations, n_active)
    if len(margins) < n_active or n_active < 1:
        raise ValueError(_unreachable(target, len(margins) / len(activations)))
    # The threshold lies between two pre-activations. If it were equal to one, rounding would
    # decide whether that one is active.
    shift = margins.topk(min(n_active + 1, len(margins))).values[n_active - 1 :].mean()
    threshold = (parameters.threshold.double() + shift.double() / norms).clamp_min(0.0)
    return replace(parameters, threshold=threshold.to(parameters.threshold.dtype))


@torch.no_grad()
def mean_l0(parameters: Parameters, activations: Float[Tensor, "tokens d_in"]) -> float:
    """Mean number of active latents over the first `L0_TOKENS` activations."""
    activations = activations[:L0_TOKENS]
    n_active = sum(int(parameters.encode(x).count_nonzero()) for x in _chunks(activations))
    return n_active / len(activations)


@torch.no_grad()
def max_l0(parameters: Parameters, activations: Float[Tensor, "tokens d_in"]) -> float:
    """The L0 with every threshold at 0, the highest that any thresholds give."""
    return mean_l0(
        replace(parameters, threshold=torch.zeros_like(parameters.threshold)), activations
    )


def check_targets(
    parameters: Parameters, targets: Sequence[float], activations: Float[Tensor, "tokens d_in"]
) -> None:
    """Check all targets before anything is trained.

    Raises:
        ValueError: as `require_positive_targets` does, or no thresholds reach a target.
    """
    require_positive_targets(targets)
    highest = max_l0(parameters, activations)
    if max(targets) > highest:
        raise ValueError(_unreachable(max(targets), highest))


def require_positive_targets(targets: Sequence[float]) -> None:
    """Check what targets are by themselves, for which no activations are needed.

    Raises:
        ValueError: there are no targets, or one is given twice or is not a positive number.
    """
    if not targets:
        raise ValueError("there are no target L0s: give at least one, such as 10,20,40")
    if len(set(targets)) != len(targets):
        raise ValueError(f"a target L0 is given twice: {', '.join(f'{t:g}' for t in targets)}")
    invalid = [target for target in targets if not 0 < target < math.inf]
    if invalid:
        raise ValueError(f"a target L0 is {invalid[0]:g}; expected a number more than 0")


def _unreachable(target: float, highest: float) -> str:
    return (
        f"no thresholds give this dictionary an L0 of {target:g}: with every threshold at 0, "
        f"{highest:.4g} latents are active per token on average. Use a target of at most "
        f"{math.floor(highest)}, or train the dictionary to it (`jumprelu finetune` with "
        "--target_l0)"
    )


@torch.no_grad()
def _largest_margins(
    parameters: Parameters, activations: Float[Tensor, "tokens d_in"], count: int
) -> Float[Tensor, " n"]:
    """At least the `count` + 1 largest z - θ over all tokens and latents with z > 0, or all.

    Values below the current `count`-th largest are dropped during the pass, so that memory stays at
    a few times `count` numbers.
    """
    margins = torch.empty(0)
    lowest = -math.inf
    for x in _chunks(activations):
        z = parameters.pre_activations(x)
        candidate = z > (parameters.threshold + lowest).clamp_min(0.0)
        margins = torch.cat([margins, (z - parameters.threshold)[candidate]])
        if len(margins) > 4 * (count + 1):
            margins = margins.topk(count + 1).values
            lowest = float(margins[-1])
    return margins


def _chunks(activations: Float[Tensor, "tokens d_in"]) -> Iterator[Float[Tensor, "chunk d_in"]]:
    return (chunk.float() for chunk in activations.split(_TOKENS_PER_ENCODE))


def _train(
    start: Parameters,
    target: float,
    activations: Float[Tensor, "tokens d_in"],
    settings: RefitSettings,
) -> Parameters:
    """`start` after the training with these settings."""
    batch = settings.batch_tokens
    if len(activations) < batch:
        raise ValueError(
            f"there are {len(activations)} activations and one batch takes {batch}: use more text, "
            "or a smaller batch_tokens (--sequences, --train_batch_size_tokens)"
        )
    scale = start.d_in**0.5 / _mean_norm(activations)
    sae = _training_sae(rescale(start, scale, unit_rows=True), target, settings)
    SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=settings.steps * batch,
            train_batch_size_samples=batch,
            lr=settings.learning_rate,
            lr_end=0.0,
            lr_decay_steps=settings.steps // 2,
            device=settings.device,
        ),
        sae=sae,
        data_provider=_batches(activations, scale, settings),
    ).fit()
    trained = Parameters.of(sae)
    # The trained norms, in the original units of the latents.
    norms = trained.W_dec.double().norm(dim=1) * decoder_norms(start)
    trained = trained.fold_scales(scale).with_decoder_norms(norms)
    names = TRAINED_PARAMETERS[settings.train]
    return replace(start, **{name: getattr(trained, name) for name in names})


def _training_sae(
    parameters: Parameters, target: float, settings: RefitSettings
) -> JumpReLUTrainingSAE:
    trained = TRAINED_PARAMETERS[settings.train]
    cfg = JumpReLUTrainingSAEConfig(
        d_in=parameters.d_in,
        d_sae=parameters.d_sae,
        target_l0=target,
        apply_b_dec_to_input=parameters.subtracts_b_dec,
        normalize_activations="none",
        # With a fixed encoder, only the row's norm can change the size of a latent's output.
        unit_norm_decoder="W_enc" in trained,
        jumprelu_ste_to_input="W_enc" in trained,
        # Latent i must stay the same latent at every L0.
        resample_dead_latents=False,
        # Its activations are scaled already, and what is not trained is to stay as it is.
        standardize_activations=False,
        device=settings.device,
    )
    sae = JumpReLUTrainingSAE(cfg)
    load_parameters_(sae, parameters)
    for name, parameter in sae.named_parameters():
        parameter.requires_grad_(name in trained)
    return sae


def _mean_norm(activations: Float[Tensor, "tokens d_in"]) -> float:
    """The activations' mean norm; raises ValueError if it is not a positive finite number."""
    total = float(sum(float(x.norm(dim=1).sum()) for x in _chunks(activations)))
    mean = total / len(activations)
    if not 0 < mean < math.inf:
        raise ValueError(f"the activations' mean norm is {mean}; check the hook and the model")
    return mean


def _batches(
    activations: Float[Tensor, "tokens d_in"], scale: float, settings: RefitSettings
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Endless scaled batches; each pass uses every token once, up to an incomplete last batch."""
    random = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_tokens
    while True:
        order = torch.randperm(len(activations), generator=random)
        for start in range(0, len(activations) - size + 1, size):
            yield scale * activations[order[start : start + size]].float().to(settings.device)
