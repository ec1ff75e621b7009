"""A recipe: values of SAELens config fields as frozen data, with their source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from jumprelu_plugin.control.learning_rate import learning_rate
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.health.schedule import usual_learning_rate

_USUAL_L0 = 40.0


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a published or measured way to train an SAE.

    Attributes:
        name: the name that `get_recipe` takes.
        source: the publication.
        description: what it does and when to use it.
        sae: values of `JumpReLUTrainingSAEConfig` fields.
        runner: values of SAELens' `LanguageModelSAERunnerConfig` fields.
        lr_from_size: whether the learning rate follows the run's size (`control.learning_rate`);
            otherwise `runner` has it.
        lr_decay_fraction: fraction of the steps, at the end, in which the learning rate falls.
        l0_warm_up_fraction: fraction of the steps, at the start, in which λ rises; 0 leaves
            `l0_warm_up_steps` as in `sae`.
        matryoshka_fractions: widths of the Matryoshka prefixes as fractions of d_sae, without 1.
    """

    name: str
    source: str
    description: str
    sae: Mapping[str, Any]
    runner: Mapping[str, Any]
    lr_from_size: bool = False
    lr_decay_fraction: float = 0.0
    l0_warm_up_fraction: float = 0.0
    matryoshka_fractions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sae", MappingProxyType(dict(self.sae)))
        object.__setattr__(self, "runner", MappingProxyType(dict(self.runner)))

    def sae_config(self, d_in: int, d_sae: int, **changes: Any) -> JumpReLUTrainingSAEConfig:
        """The SAE's config for these widths; `changes` override fields of the recipe."""
        return JumpReLUTrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, **self.sae_fields(d_sae, **changes)
        )

    def sae_fields(self, d_sae: int, **changes: Any) -> dict[str, Any]:
        """The fields of `sae_config` beside its widths."""
        fields = {**self.sae, **self.matryoshka_fields(d_sae), **changes}
        if fields.get("l0_coefficient") is None and "l0_warm_up_steps" not in changes:
            fields.pop("l0_warm_up_steps", None)  # there is no fixed penalty to warm up
        return fields

    def matryoshka_fields(self, d_sae: int) -> dict[str, Any]:
        """The SAE's fields that depend on the number of latents."""
        if not self.matryoshka_fractions:
            return {}
        widths = {max(1, round(fraction * d_sae)) for fraction in self.matryoshka_fractions}
        return {"matryoshka_widths": sorted(widths)}

    def learning_rate(self, sae: Any, training_tokens: int, batch: int) -> float:
        """SAELens' `lr` for a run.

        Args:
            sae: the SAE's config. Without a possible `target_l0` an L0 of 40 is assumed.
            training_tokens: tokens of the run.
            batch: tokens a step.
        """
        if not self.lr_from_size:
            return self.runner["lr"]
        l0 = sae.target_l0 if (sae.target_l0 or 0) > 0 else _USUAL_L0
        return learning_rate(sae.d_in, sae.d_sae, l0, batch, training_tokens // batch)

    def learning_rate_of(self, cfg: LanguageModelSAERunnerConfig[Any]) -> float | None:
        """The learning rate of the run that `cfg` describes: the recipe's own, or else the same as
        without a recipe; None where SAELens' default stays."""
        return usual_learning_rate(cfg) if self.lr_from_size else self.runner["lr"]

    def lr_decay_steps(self, steps: int) -> int:
        """SAELens' `lr_decay_steps` for a run of this many steps."""
        return round(self.lr_decay_fraction * steps)

    def l0_warm_up_steps(self, steps: int) -> int:
        """SAELens' `l0_warm_up_steps` for a run of this many steps."""
        warm_up = round(self.l0_warm_up_fraction * steps)
        return warm_up or self.sae.get("l0_warm_up_steps", 0)

    def adapt_to_run(self, cfg: LanguageModelSAERunnerConfig[Any], given: Collection[str]) -> None:
        """Set the fields of `cfg` beside `lr` that depend on the run's length and on widths.

        Args:
            given: names of the user's own flags, whose fields stay as they are.
        """
        steps = cfg.training_tokens // cfg.train_batch_size_tokens
        if "--lr_decay_steps" not in given:
            cfg.lr_decay_steps = self.lr_decay_steps(steps)
        sae_fields = self.matryoshka_fields(cfg.sae.d_sae)
        if cfg.sae.l0_coefficient is None:  # there is no fixed penalty to warm up
            sae_fields["l0_warm_up_steps"] = 0
        elif self.l0_warm_up_fraction:
            sae_fields["l0_warm_up_steps"] = self.l0_warm_up_steps(steps)
        for name, value in sae_fields.items():
            if f"--{name}" not in given:
                setattr(cfg.sae, name, value)

    def field_values(self) -> dict[str, str]:
        """Every field that the recipe sets and its value as text."""
        values = {name: str(value) for name, value in {**self.sae, **self.runner}.items()}
        if self.matryoshka_fractions:
            fractions = ", ".join(
                str(Fraction(fraction).limit_denominator())
                for fraction in self.matryoshka_fractions
            )
            values["matryoshka_widths"] = f"{fractions} of d_sae, and d_sae"
        if self.lr_from_size:
            values["lr"] = "from d_in, d_sae, target_l0, batch and steps"
        if self.l0_warm_up_fraction:
            values["l0_warm_up_steps"] = f"{self.l0_warm_up_fraction:.0%} of the run"
        if self.lr_decay_fraction:
            values["lr_decay_steps"] = f"{self.lr_decay_fraction:.0%} of the run"
        return values

    def flags(self) -> list[str]:
        """The recipe as flags of `jumprelu train`, without the fields that `adapt_to_run` sets."""
        values = {**self.sae, **self.runner}
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]
