"""The settings of a rating study; imports nothing heavy, for the command line's help."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True)
class RatingStudySettings:
    """What a rating set holds.

    Attributes:
        latents: latents drawn from each SAE.
        contexts: contexts shown of a latent, half of them its top activations and half firings at
            even quantiles.
        sequences: held-out sequences to search for contexts.
        raters: number of raters, or their names, as in anna,ben,chris.
        overlap: share of the latents that every rater rates; the others are dealt to one rater
            each.
        strata: strata of latent density that are sampled equally.
        seed: of the draw, the order and the deal.
    """

    latents: int = 20
    contexts: int = 10
    sequences: int = 512
    raters: str = "5"
    overlap: float = 0.3
    strata: int = 4
    seed: int = 0

    def rater_names(self) -> list[str]:
        """The raters' names.

        Raises:
            ValueError: a name is not made of letters, digits, - and _, or comes twice.
        """
        if self.raters.isdigit():
            names = [f"rater-{i + 1}" for i in range(int(self.raters))]
        else:
            names = [name.strip() for name in self.raters.split(",")]
        wrong = [name for name in names if not _NAME.fullmatch(name)]
        if not names or wrong or len(set(names)) < len(names):
            raise ValueError(
                f"raters is {self.raters!r}; give a number from 1, or different names of letters, "
                "digits, - and _, such as anna,ben,chris"
            )
        return names
