"""What a recipe is: SAELens config fields, frozen, with where each number comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig


@dataclass(frozen=True)
class Recipe:
    """A way to train, as data.

    Attributes:
        name: how it is asked for.
        source: the publication.
        about: what it does and when to take it, in a sentence or two.
        sae: fields of `JumpReLUTrainingSAEConfig`.
        runner: fields of SAELens' `LanguageModelSAERunnerConfig`.
        decay_share: share of a run's steps over which the learning rate falls, at its end.
        penalty_share: share of a run's steps over which λ rises, at its start. 0: as `sae` says.
        prefix_shares: Matryoshka prefixes, as shares of the dictionary; the whole one goes without
            saying.
    """

    name: str
    source: str
    about: str
    sae: Mapping[str, Any]
    runner: Mapping[str, Any]
    decay_share: float = 0.0
    penalty_share: float = 0.0
    prefix_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sae", MappingProxyType(dict(self.sae)))
        object.__setattr__(self, "runner", MappingProxyType(dict(self.runner)))

    def sae_config(self, d_in: int, d_sae: int, **changes: Any) -> JumpReLUTrainingSAEConfig:
        """The SAE's config for these widths; `changes` override fields of the recipe."""
        fields = {**self.sae, **self.for_width(d_sae), **changes}
        return JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **fields)

    def for_width(self, d_sae: int) -> dict[str, Any]:
        """The fields that depend on how many latents there are."""
        if not self.prefix_shares:
            return {}
        widths = {max(1, round(share * d_sae)) for share in self.prefix_shares}
        return {"matryoshka_widths": sorted(widths)}

    def decay_steps(self, steps: int) -> int:
        """SAELens' `lr_decay_steps` for a run of this length."""
        return round(self.decay_share * steps)

    def penalty_steps(self, steps: int) -> int:
        """SAELens' `l0_warm_up_steps` for a run of this length."""
        rising = round(self.penalty_share * steps)
        return rising or self.sae.get("l0_warm_up_steps", 0)

    def fit(self, cfg: LanguageModelSAERunnerConfig[Any], given: Sequence[str]) -> None:
        """Set what depends on the run's length and width, but for what flags in `given` set."""
        steps = cfg.training_tokens // cfg.train_batch_size_tokens
        names = {flag.partition("=")[0] for flag in given}
        if "--lr_decay_steps" not in names:
            cfg.lr_decay_steps = self.decay_steps(steps)
        of_sae = self.for_width(cfg.sae.d_sae)
        if self.penalty_share:
            of_sae["l0_warm_up_steps"] = self.penalty_steps(steps)
        for name, value in of_sae.items():
            if f"--{name}" not in names:
                setattr(cfg.sae, name, value)

    def numbers(self) -> dict[str, str]:
        """Every field the recipe sets, for people to read."""
        shown = {name: str(value) for name, value in {**self.sae, **self.runner}.items()}
        if self.prefix_shares:
            shares = ", ".join(
                str(Fraction(share).limit_denominator()) for share in self.prefix_shares
            )
            shown["matryoshka_widths"] = f"{shares} of d_sae, and d_sae"
        if self.penalty_share:
            shown["l0_warm_up_steps"] = f"{self.penalty_share:.0%} of the run"
        if self.decay_share:
            shown["lr_decay_steps"] = f"{self.decay_share:.0%} of the run"
        return shown

    def flags(self) -> list[str]:
        """The recipe as flags of `jumprelu train`, but for what `fit` sets."""
        numbers = {**self.sae, **self.runner}
        return [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
