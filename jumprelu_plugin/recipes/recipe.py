"""What a recipe is: SAELens config fields, frozen, with where each number comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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
    """

    name: str
    source: str
    about: str
    sae: Mapping[str, Any]
    runner: Mapping[str, Any]
    decay_share: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sae", MappingProxyType(dict(self.sae)))
        object.__setattr__(self, "runner", MappingProxyType(dict(self.runner)))

    def sae_config(self, d_in: int, d_sae: int, **changes: Any) -> JumpReLUTrainingSAEConfig:
        """The SAE's config for these widths; `changes` override fields of the recipe."""
        return JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, **{**self.sae, **changes})

    def decay_steps(self, steps: int) -> int:
        """SAELens' `lr_decay_steps` for a run of this length."""
        return round(self.decay_share * steps)

    def flags(self) -> list[str]:
        """The recipe as flags of `jumprelu train`, but for what depends on the run's length."""
        numbers = {**self.sae, **self.runner}
        return [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
