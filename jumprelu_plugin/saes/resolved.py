"""What the optional fields of a training config resolve to.

A field that the user leaves out means something that depends on others: on the target L0, the
width, whether L0 is controlled. That is decided here, once; `jumprelu check` prints it, and the
training reads nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jumprelu_plugin.control.dictionary_control import ControlSettings
from jumprelu_plugin.control.standardization import OUTLIER_NORM_RATIO
from jumprelu_plugin.control.units import units_of

if TYPE_CHECKING:
    from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig

T = TypeVar("T")


class _StraightThrough(Protocol):
    """The part of a training config that says where the estimators' gradient goes."""

    @property
    def jumprelu_ste_to_input(self) -> bool: ...

    @property
    def jumprelu_ste_input_share(self) -> float | None: ...

    @property
    def controls_l0(self) -> bool: ...


# Of the estimators' gradient, to the encoder: all of it lets latents die on data of few dimensions
# and on data that drift, and none finds fewer features on text (docs/ablations.md).
CONTROLLED_INPUT_SHARE = 0.5
# The prefixes are these parts of the latents. Longer ones cost more and find less.
PREFIX_PARTS = (32, 16, 8)
# Times the mean density. A limit below the first is raised to it, since it costs the more the
# nearer it is; one below the second is left out, since it would hold most latents down.
ROOM_FOR_DENSITY, LEAST_ROOM = 2.0, 1.5


# What a neutral value is called.
_ABSENT: dict[str, tuple[float, str]] = {
    "target_l0": (0.0, "none"),
    "quadratic_target": (0.0, "none"),
    "jumprelu_bandwidth": (0.0, "from the first batch"),
    "jumprelu_init_threshold": (0.0, "from the first batch"),
    "max_latent_density": (1.0, "no limit"),
    "density_penalty_scale": (math.inf, "no penalty"),
    "outlier_norm_ratio": (math.inf, "no limit"),
    "pre_act_loss_coefficient": (0.0, "no such loss"),
    "aux_loss_coefficient": (0.0, "no such loss"),
}


@dataclass(frozen=True)
class ResolvedConfig(ControlSettings):
    """A training config with every optional field resolved, under the same names.

    A neutral value stands for what is absent: 0 for a coefficient or a weight, infinity for a scale
    or a ratio, 1 for a density. ε and θ₀ are in the units of training (`control.units`), and 0
    there means that the first batch gives them.

    Attributes:
        l0_coefficient: the fixed λ; 1 where it is measured, which the measured λ multiplies.
        quadratic_target: where the `quadratic` penalty has its minimum; 0 where there is no target.
        density_penalty_scale: ω₀; infinity: no penalty.
        matryoshka_widths: of the prefixes, without the whole dictionary.
        matryoshka_loss_weight: of the mean of their errors, beside the whole dictionary's.
        outlier_norm_ratio: times the median distance from the center; infinity: no limit.
        standardize_activations: whether training works in units of the data's own center and
            spread (`control.standardization`).
        pre_act_loss_coefficient, aux_loss_coefficient: 0: no such loss.
    """

    l0_coefficient: float
    quadratic_target: float
    density_penalty_scale: float
    matryoshka_widths: tuple[int, ...]
    matryoshka_loss_weight: float
    outlier_norm_ratio: float
    standardize_activations: bool
    pre_act_loss_coefficient: float
    aux_loss_coefficient: float

    def described(self) -> dict[str, str]:
        """Every field of a config in words, for reading."""
        names = (field.name for field in dataclasses.fields(self))
        values = {n: getattr(self, n) for n in names if n != "ste_input_share_is_given"}
        words = {name: _in_words(name, value) for name, value in values.items()}
        return {**words, "l0_coefficient": "measured"} if self.controls_l0 else words


def resolve(cfg: JumpReLUTrainingSAEConfig) -> ResolvedConfig:
    """Resolve a config that `saes.validation` accepts."""
    controlled, target = cfg.controls_l0, cfg.target_l0 or 0.0
    units = units_of(cfg.hyperparameter_units, cfg.d_in)
    widths = _prefix_widths(cfg)
    return ResolvedConfig(
        d_sae=cfg.d_sae,
        controls_l0=controlled,
        target_l0=target,
        target_l0_start_ratio=cfg.target_l0_start_ratio,
        target_l0_warm_up_steps=cfg.target_l0_warm_up_steps,
        jumprelu_bandwidth=units.activation * (cfg.jumprelu_bandwidth or 0.0),
        jumprelu_bandwidth_std=cfg.jumprelu_bandwidth_std,
        jumprelu_init_threshold=units.activation * (cfg.jumprelu_init_threshold or 0.0),
        **ste_input_share(cfg),
        max_latent_density=density_limit(
            cfg.max_latent_density, target / cfg.d_sae, controls_l0=controlled
        ),
        resample_dead_latents=_or(cfg.resample_dead_latents, controlled),
        unit_norm_decoder=_or(cfg.unit_norm_decoder, controlled),
        # The controller is the schedule: 1 is what it multiplies.
        l0_coefficient=1.0 if cfg.l0_coefficient is None else cfg.l0_coefficient,
        # An L0-controlled training is held at its target, where the penalty would be flat and have
        # no multiplier: it is centered at half the target instead.
        quadratic_target=0.5 * target if controlled else target,
        density_penalty_scale=_or(cfg.density_penalty_scale, math.inf),
        matryoshka_widths=widths,
        matryoshka_loss_weight=_prefix_weight(cfg, widths),
        outlier_norm_ratio=_outlier_norm_ratio(cfg),
        standardize_activations=_or(cfg.standardize_activations, controlled),
        pre_act_loss_coefficient=_or(cfg.pre_act_loss_coefficient, 0.0),
        aux_loss_coefficient=_or(cfg.aux_loss_coefficient, 0.0),
    )


def ste_input_share(cfg: _StraightThrough) -> dict[str, Any]:
    """How much of the estimators' gradient the encoder receives, and whether the config says so."""
    given = cfg.jumprelu_ste_input_share if cfg.jumprelu_ste_to_input else 0.0
    usual = CONTROLLED_INPUT_SHARE if cfg.controls_l0 else 1.0
    return {
        "jumprelu_ste_input_share": _or(given, usual),
        "ste_input_share_is_given": given is not None,
    }


def density_limit(given: float | None, mean_density: float, *, controls_l0: bool) -> float:
    """The largest latent density to allow; 1 is no limit.

    Args:
        given: what the config says.
        mean_density: the target L0 over d_sae.
    """
    if given is None:
        return 1.0
    if not controls_l0:
        return given
    if LEAST_ROOM * mean_density > given:
        return 1.0
    return min(1.0, max(given, ROOM_FOR_DENSITY * mean_density))


def _prefix_widths(cfg: JumpReLUTrainingSAEConfig) -> tuple[int, ...]:
    if cfg.matryoshka_loss_weight == 0:
        return ()
    if cfg.matryoshka_widths is not None:
        return tuple(width for width in cfg.matryoshka_widths if width < cfg.d_sae)
    if cfg.matryoshka_loss_weight is None:
        return ()
    return tuple(sorted({cfg.d_sae // part for part in PREFIX_PARTS} - {0}))


def _prefix_weight(cfg: JumpReLUTrainingSAEConfig, widths: tuple[int, ...]) -> float:
    return float(len(widths)) if cfg.matryoshka_loss_weight is None else cfg.matryoshka_loss_weight


def _outlier_norm_ratio(cfg: JumpReLUTrainingSAEConfig) -> float:
    if cfg.outlier_norm_ratio is None:
        limited = cfg.controls_l0 and cfg.outlier_limit_by_default
        return OUTLIER_NORM_RATIO if limited else math.inf
    return cfg.outlier_norm_ratio or math.inf


def _or(given: T | None, default: T) -> T:
    return default if given is None else given


def _in_words(name: str, value: object) -> str:
    if _ABSENT.get(name, (None,))[0] == value:
        return _ABSENT[name][1]
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
