"""A recipe for transcoders: like `Recipe`, with values for the transcoders' config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from jumprelu_plugin.recipes.recipe import Recipe
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)


@dataclass(frozen=True)
class TranscoderRecipe(Recipe):
    """A recipe whose `sae` holds values of `JumpReLUTrainingTranscoderConfig` fields."""

    @override
    def sae_config(
        self, d_in: int, d_sae: int, *, skip: bool = False, **changes: Any
    ) -> JumpReLUTrainingTranscoderConfig:
        """The transcoder's config for these widths; `changes` override fields of the recipe.

        Args:
            d_in: width of the input.
            d_sae: number of latents.
            skip: whether to add a linear map from input to output.
            changes: other fields; give at least `d_out` and `hook_name_out`.
        """
        kind = JumpReLUTrainingSkipTranscoderConfig if skip else JumpReLUTrainingTranscoderConfig
        return kind(d_in=d_in, d_sae=d_sae, **self.sae_fields(d_sae, **changes))

    @override
    def flags(self) -> list[str]:
        return ["--architecture", "jumprelu_transcoder", *super().flags()]
