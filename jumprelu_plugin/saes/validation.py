"""What a training config must hold: one table of field, predicate and message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jumprelu_plugin.control.units import INPUT_UNITS
from jumprelu_plugin.step.choose import STEP_PATHS
from jumprelu_plugin.step.losses import SPARSITY_MODES


@dataclass(frozen=True)
class Rule:
    """One thing that a config must hold.

    Attributes:
        field: the field that is wrong where it does not.
        holds: a predicate of the config.
        message: what is expected and what to do. `{value}` is the field's value and `{cfg.name}`
            another field's.
    """

    field: str
    holds: Callable[[Any], bool]
    message: str

    def text(self, cfg: Any) -> str:
        """The message for this config."""
        return self.message.format(field=self.field, value=getattr(cfg, self.field), cfg=cfg)


def require(cfg: Any, rules: Iterable[Rule]) -> None:
    """Raise ValueError for a field that holds no value of its type, and then with the message of
    the first rule that does not hold."""
    require_types(cfg)
    for rule in rules:
        if not rule.holds(cfg):
            raise ValueError(rule.text(cfg))


def require_types(cfg: Any) -> None:
    """Raise ValueError where a dataclass has something else for a number, a yes or no, or a list of
    numbers; what other fields hold is not looked at."""
    for field, hint in _type_hints(type(cfg)).items():
        value = getattr(cfg, field)
        if not _fits(hint, value):
            raise ValueError(f"{field} is {value!r}; it must be {_in_words(hint)}")


def require_at_least(settings: Any, least: Mapping[str, float]) -> None:
    """Raise ValueError for the first field whose number is below the least; None is no number."""
    for name, number in least.items():
        value = getattr(settings, name)
        if value is not None and value < number:
            raise ValueError(f"{name} is {value}; give at least {number}")


@cache
def _type_hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(hint: Any, value: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if kind in (int, float):
        return isinstance(value, Real) and not isinstance(value, bool)
    if kind is bool:
        return value in (False, True)
    if kind is NoneType:
        return value is None
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(parts[0], part) for part in value)
    return True


def _in_words(hint: Any) -> str:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if kind in (list, tuple):
        return f"a list of {_in_words(parts[0]).removeprefix('a ')}s"
    words = {int: "a number", float: "a number", bool: "True or False", NoneType: "None"}
    return words.get(kind, str(kind))


def positive(field: str, message: str = "it must be a finite number greater than 0") -> Rule:
    """The field is None or a finite number above 0."""
    return Rule(field, _number(field, lambda v: 0 < v < math.inf), "{field} is {value}; " + message)


def not_negative(field: str, message: str = "it must be a finite number, 0 or more") -> Rule:
    """The field is None or a finite number, 0 or more."""
    return Rule(
        field, _number(field, lambda v: 0 <= v < math.inf), "{field} is {value}; " + message
    )


def whole(field: str, least: int) -> Rule:
    """The field is a whole number, and not too small."""
    return Rule(
        field,
        lambda cfg: isinstance(getattr(cfg, field), Integral) and getattr(cfg, field) >= least,
        f"{{field}} is {{value!r}}; it must be a whole number, {least} or more",
    )


def one_of(field: str, allowed: Sequence[str]) -> Rule:
    """The field is one of these words."""
    return Rule(
        field,
        lambda cfg: getattr(cfg, field) in allowed,
        f"{{field}} is {{value!r}}; it must be one of {', '.join(allowed)}",
    )


def a_density(field: str) -> Rule:
    """The field is None or a share of the tokens."""
    return Rule(
        field,
        _number(field, lambda v: 0 < v <= 1),
        "{field} is {value}; it must be a share of the tokens, greater than 0 and at most 1, or "
        "None for no limit",
    )


def a_share_with_input() -> Rule:
    """A share of the estimators' gradient is one, and reaches the encoder."""
    field = "jumprelu_ste_input_share"
    return Rule(
        field,
        lambda cfg: (
            getattr(cfg, field) is None
            or (cfg.jumprelu_ste_to_input and 0 < getattr(cfg, field) <= 1)
        ),
        "{field} is {value} and jumprelu_ste_to_input is {cfg.jumprelu_ste_to_input}; a share is "
        "greater than 0 and at most 1, and belongs to jumprelu_ste_to_input=True. For the paper's "
        "estimators, which do not reach the encoder, set jumprelu_ste_to_input=False alone",
    )


def a_target(example: float) -> Rule:
    """There is a target L0 or a coefficient."""
    return Rule(
        "target_l0",
        lambda cfg: cfg.l0_coefficient is not None or cfg.target_l0 is not None,
        "neither target_l0 nor l0_coefficient is set: give target_l0"
        f"={example:g}, for example, to train for {example:g} active latents a token, or "
        "l0_coefficient for a fixed sparsity penalty",
    )


def unread_bandwidth_std() -> Rule:
    """No spread is given for a bandwidth that is fixed."""
    return Rule(
        "jumprelu_bandwidth_std",
        lambda cfg: (
            cfg.jumprelu_bandwidth is None
            or cfg.jumprelu_bandwidth_std == type(cfg).jumprelu_bandwidth_std
        ),
        "{field} is {value} and jumprelu_bandwidth is {cfg.jumprelu_bandwidth}: give one of them",
    )


def unread_tanh_scale() -> Rule:
    """L0-controlled, no scale is given for a tanh that is not in the loss."""
    return Rule(
        "jumprelu_tanh_scale",
        lambda cfg: (
            not cfg.controls_l0
            or cfg.jumprelu_sparsity_loss_mode == "tanh"
            or cfg.jumprelu_tanh_scale == type(cfg).jumprelu_tanh_scale
        ),
        "{field} is {value}, and jumprelu_sparsity_loss_mode {cfg.jumprelu_sparsity_loss_mode!r} "
        "has no tanh: set jumprelu_sparsity_loss_mode='tanh', or leave the scale out",
    )


def no_fixed_penalty_to_warm_up(remedy: str) -> Rule:
    """L0-controlled, there is no coefficient that could rise."""
    return Rule(
        "l0_warm_up_steps",
        lambda cfg: not (cfg.controls_l0 and cfg.l0_warm_up_steps),
        "{field} is {value} and l0_coefficient is None: there is no fixed penalty to warm up. "
        + remedy,
    )


def _number(field: str, accepts: Callable[[float], bool]) -> Callable[[Any], bool]:
    def holds(cfg: Any) -> bool:
        value = getattr(cfg, field)
        return value is None or accepts(value)

    return holds


def _widths_rise(cfg: Any) -> bool:
    widths = cfg.matryoshka_widths
    return widths is None or (
        bool(widths)
        and all(isinstance(width, int) and 0 < width <= cfg.d_sae for width in widths)
        and all(first < second for first, second in pairwise(widths))
    )


_FROM_DATA = (
    "it must be greater than 0 (leave it out in jumprelu_plugin.JumpReLUTrainingSAEConfig to take "
    "it from the data)"
)

SAE_RULES = (
    whole("d_in", 1),
    whole("d_sae", 1),
    a_target(40),
    Rule(
        "target_l0",
        lambda cfg: cfg.jumprelu_sparsity_loss_mode != "quadratic" or cfg.target_l0 is not None,
        "cfg.target_l0 must be set for quadratic sparsity loss mode: it is where the penalty has "
        "its minimum",
    ),
    Rule(
        "l0_coefficient",
        _number("l0_coefficient", math.isfinite),
        "{field} is {value}; it must be a finite number",
    ),
    Rule(
        "jumprelu_init_threshold",
        _number("jumprelu_init_threshold", lambda v: v > 0),
        "{field} is {value}; " + _FROM_DATA,
    ),
    Rule(
        "jumprelu_bandwidth",
        _number("jumprelu_bandwidth", lambda v: v > 0),
        "{field} is {value}; " + _FROM_DATA,
    ),
    positive("decoder_init_norm", "it must be a finite number greater than 0, or None"),
    positive("jumprelu_tanh_scale"),
    not_negative("pre_act_loss_coefficient", "it must be a finite number, 0 or more, or None"),
    whole("l0_warm_up_steps", 0),
    positive("target_l0_start_ratio"),
    positive("jumprelu_bandwidth_std"),
    positive(
        "density_penalty_scale",
        "it must be a finite number greater than 0 (0.01 as published), or None for no density "
        "penalty",
    ),
    a_density("max_latent_density"),
    a_share_with_input(),
    not_negative("matryoshka_loss_weight", "it must be a finite number, 0 or more, or None"),
    not_negative("outlier_norm_ratio", "it must be a finite number, 0 or more, or None"),
    Rule(
        "matryoshka_widths",
        _widths_rise,
        "{field} is {value}; it must be whole numbers of latents in rising order, from 1 to d_sae, "
        "which is {cfg.d_sae}, or None for the default",
    ),
    not_negative(
        "aux_loss_coefficient",
        "it must be a finite number, 0 or more (1/32 as published), or None for no auxiliary loss",
    ),
    Rule(
        "aux_loss_coefficient",
        lambda cfg: cfg.aux_loss_coefficient is None or cfg.normalize_activations != "layer_norm",
        "{field} is {value} and normalize_activations is 'layer_norm': dead latents would have to "
        "reconstruct a residual on another scale than their own. Use 'expected_average_only_in' or "
        "'none'",
    ),
    Rule(
        "initialization",
        lambda cfg: cfg.initialization != "anthropic" or cfg.jumprelu_init_threshold is not None,
        "{field} is 'anthropic' and jumprelu_init_threshold is None: biases are set for a known "
        "threshold; give one (0.1 as published)",
    ),
    whole("target_l0_warm_up_steps", 0),
    Rule(
        "target_l0",
        lambda cfg: cfg.target_l0 is None or 0 < cfg.target_l0 <= cfg.d_sae,
        "{field} is {value}; it must be greater than 0 and at most d_sae, which is {cfg.d_sae}",
    ),
    Rule(
        "target_l0_start_ratio",
        lambda cfg: 1 <= cfg.target_l0_start_ratio <= cfg.d_sae / (cfg.target_l0 or 1),
        "{field} is {value}; it must be at least 1, and times target_l0 ({cfg.target_l0}) at most "
        "d_sae ({cfg.d_sae})",
    ),
    one_of("reshape_activations", ("none", "hook_z")),
    one_of("jumprelu_sparsity_loss_mode", SPARSITY_MODES),
    one_of("pre_act_loss_latents", ("dead", "all")),
    one_of("initialization", ("saelens", "anthropic")),
    one_of("hyperparameter_units", INPUT_UNITS),
    one_of("step_kernel", STEP_PATHS),
)

# Fields of ours that would do nothing in the mode chosen, and a target that nothing would hold.
# With a fixed coefficient SAELens' other fields mean what they mean there: a mode does not read
# another mode's.
EFFECT_RULES = (
    Rule(
        "target_l0",
        lambda cfg: (
            cfg.target_l0 is None
            or cfg.controls_l0
            or cfg.jumprelu_sparsity_loss_mode == "quadratic"
        ),
        "{field} is {value} and l0_coefficient is fixed at {cfg.l0_coefficient}: give one of them. "
        "To hold the target, set l0_coefficient=None (--l0_coefficient None where a recipe has "
        "one); for the fixed coefficient, leave {field} out",
    ),
    no_fixed_penalty_to_warm_up(
        "Give target_l0_warm_up_steps with target_l0_start_ratio to come down to the target, or an "
        "l0_coefficient"
    ),
    Rule(
        "target_l0_warm_up_steps",
        lambda cfg: (
            not cfg.target_l0_warm_up_steps or (cfg.controls_l0 and cfg.target_l0_start_ratio != 1)
        ),
        "{field} is {value}, which needs a target_l0_start_ratio above 1 (it is "
        "{cfg.target_l0_start_ratio}) and no l0_coefficient (it is {cfg.l0_coefficient})",
    ),
    Rule(
        "target_l0_start_ratio",
        lambda cfg: (
            cfg.target_l0_start_ratio == 1 or (cfg.controls_l0 and cfg.target_l0_warm_up_steps > 0)
        ),
        "{field} is {value}, which needs target_l0_warm_up_steps (they are "
        "{cfg.target_l0_warm_up_steps}) and no l0_coefficient (it is {cfg.l0_coefficient})",
    ),
    unread_bandwidth_std(),
    unread_tanh_scale(),
    Rule(
        "decoder_init_norm",
        lambda cfg: (
            not cfg.resolve().unit_norm_decoder
            or cfg.decoder_init_norm in (type(cfg).decoder_init_norm, 1.0, None)
        ),
        "{field} is {value}, and decoder rows are held at norm 1: leave it out, or set "
        "unit_norm_decoder=False",
    ),
    Rule(
        "pre_act_loss_latents",
        lambda cfg: cfg.pre_act_loss_latents == "dead" or cfg.pre_act_loss_coefficient is not None,
        "{field} is {value!r} and pre_act_loss_coefficient is None: give a coefficient (3e-6 as "
        "published), or leave both out",
    ),
    Rule(
        "matryoshka_loss_weight",
        lambda cfg: not cfg.matryoshka_loss_weight or bool(cfg.resolve().matryoshka_widths),
        "{field} is {value}, and there are no prefixes to weigh: give matryoshka_widths",
    ),
)

TRANSCODER_RULES = (
    *SAE_RULES,
    Rule(
        "d_out",
        lambda cfg: cfg.width_out >= 1,
        "{field} is {value}; it must be the width of the output hook",
    ),
    Rule(
        "apply_b_dec_to_input",
        lambda cfg: not cfg.apply_b_dec_to_input,
        "{field} is True, but a transcoder's b_dec lives in the output's space: leave it False",
    ),
    Rule(
        "initialization",
        lambda cfg: cfg.initialization == "saelens",
        "{field} is {value!r}, which makes the encoder from the decoder; a transcoder's are drawn "
        "apart: leave it 'saelens'",
    ),
    Rule(
        "normalize_activations",
        lambda cfg: cfg.normalize_activations in ("none", "expected_average_only_in"),
        "{field} is {value!r}; a transcoder takes none or expected_average_only_in: nothing else "
        "can be folded into its weights",
    ),
    Rule(
        "reshape_activations",
        lambda cfg: cfg.reshape_activations == "none",
        "{field} is {value!r}; a transcoder takes flattened heads: leave it 'none'",
    ),
)
