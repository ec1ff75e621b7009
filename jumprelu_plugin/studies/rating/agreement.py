"""What the ratings say: shares with intervals, agreement of the raters, groups compared.

Several ratings of one latent are not independent. Everything here therefore counts latents: a
latent's share of yes is the mean over its raters, and an interval is over latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.studies.comparison import Group
from jumprelu_plugin.studies.rating.ratings import RATINGS

# no, maybe, yes as points on the scale from 0 to 1.
POINTS = {"no": 0.0, "maybe": 0.5, "yes": 1.0}


@dataclass(frozen=True)
class Share:
    """A share of the latents, with Wilson's 95 % interval over latents."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class LabelRatings:
    """The ratings of one group of SAEs.

    Attributes:
        latents: number of latents with a rating.
        ratings: number of ratings.
        shares: for each of yes, maybe, no, its share.
        weighted_shares: the same, each latent weighted by its density; they say how much of what is
            active is rated so.
        mean_points: mean over latents of no = 0, maybe = 0.5, yes = 1.
    """

    latents: int
    ratings: int
    shares: dict[str, Share]
    weighted_shares: dict[str, float]
    mean_points: float


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha over the latents that several raters rated.

    Attributes:
        alpha_ordinal: with no < maybe < yes; None where it does not exist.
        alpha_nominal: with three unordered answers.
        latents: number of latents with two ratings or more.
        why_none: why there is no alpha.
    """

    alpha_ordinal: float | None
    alpha_nominal: float | None
    latents: int
    why_none: str | None


@dataclass(frozen=True)
class RatedLatent:
    """A latent with its ratings by rater, and what the key says of it."""

    label: str
    density: float
    ratings: Mapping[str, str]

    @property
    def points(self) -> float:
        """The mean of its ratings in `POINTS`."""
        return math.fsum(POINTS[r] for r in self.ratings.values()) / len(self.ratings)

    def share(self, rating: str) -> float:
        """The share of its ratings that are `rating`."""
        return list(self.ratings.values()).count(rating) / len(self.ratings)


def label_ratings(latents: Sequence[RatedLatent]) -> LabelRatings:
    """Shares over latents that have ratings; there is at least one.

    Wilson's interval takes the mean share as that of independent latents, which is conservative:
    a mean of several raters varies less than one rating.
    """
    proportion = require_extra("statsmodels.stats.proportion", "studies")
    count, weight = len(latents), math.fsum(each.density for each in latents)
    shares = {}
    for rating in RATINGS:
        total = math.fsum(each.share(rating) for each in latents)
        low, high = proportion.proportion_confint(total, count, method="wilson")
        shares[rating] = Share(total / count, max(0.0, float(low)), min(1.0, float(high)))
    return LabelRatings(
        latents=count,
        ratings=sum(len(each.ratings) for each in latents),
        shares=shares,
        weighted_shares={
            rating: math.fsum(each.share(rating) * each.density for each in latents) / weight
            for rating in RATINGS
        },
        mean_points=math.fsum(each.points for each in latents) / count,
    )


def rater_agreement(latents: Sequence[RatedLatent]) -> Agreement:
    """Krippendorff's alpha, which takes any number of raters and missing ratings."""
    alpha = require_extra("krippendorff", "studies").alpha
    shared = [each for each in latents if len(each.ratings) > 1]
    given = {rating for each in shared for rating in each.ratings.values()}
    if not shared or len(given) < 2:
        why = "no latent has two ratings" if not shared else "all raters gave the same answer"
        return Agreement(None, None, len(shared), why)
    raters = sorted({rater for each in shared for rater in each.ratings})
    data = [
        [POINTS[each.ratings[r]] if r in each.ratings else math.nan for each in shared]
        for r in raters
    ]
    domain = list(POINTS.values())
    ordinal, nominal = (
        float(alpha(reliability_data=data, value_domain=domain, level_of_measurement=level))
        for level in ("ordinal", "nominal")
    )
    return Agreement(ordinal, nominal, len(shared), None)


def rating_groups(by_label: Mapping[str, Sequence[RatedLatent]]) -> dict[str, Group]:
    """The groups to compare; a latent is positive where most of its ratings are yes."""
    return {
        label: Group(
            scores=[each.points for each in latents],
            positive=[each.share("yes") > 0.5 for each in latents],
            densities=[each.density for each in latents],
        )
        for label, latents in by_label.items()
    }
