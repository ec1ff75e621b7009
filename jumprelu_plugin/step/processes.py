"""What one process has of a training, and how it reaches the rest: here it has everything.

A training may be split over several processes in two ways. A dictionary is split by its latents:
each process holds a *shard* of them. A batch is split by its tokens: each *replica* of the
dictionary reads its own part, all parts being equally long. What a step needs of the whole
dictionary are a few sums over latents, and of the whole batch a few means over tokens, written once
where they are taken, against the methods below. `OneProcess` gives every value back as it is.
`training.distributed` has the processes that exchange them.

Whatever is a mean over a replica's tokens has a gradient of these tokens alone. The gradients of
all replicas are averaged after a backward pass, so a mean over replicas hands its own on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor


class OneProcess:
    """A training in one process, which holds every latent and reads every token.

    Attributes:
        replicas: over how many processes each batch is split.
    """

    replicas: int = 1

    def __deepcopy__(self, memo: Any) -> OneProcess:
        return self  # a copied dictionary is held by the same processes

    # ---------------------------------------------------------------- latents

    def held(self, d_sae: int) -> int:
        """How many of the dictionary's latents this process holds."""
        return d_sae

    def sum_over_shards(self, partial: Tensor) -> Tensor:
        """The sum of every shard's `partial`. Its gradient reaches each shard's as it is."""
        return partial

    def count_over_shards(self, count: float | Tensor) -> float:
        """The sum of a count of latents, on the host."""
        return float(count)

    def mean_over_shards(self, values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The mean over what all shards have, however many each."""
        return values.mean()

    def median_over_shards(
        self, values: Float[Tensor, " held"], where: Bool[Tensor, " held"]
    ) -> Float[Tensor, ""]:
        """The median over these latents of a value of each."""
        return self.gather_latents(values)[self.gather_latents(where)].median()

    def max_over_shards(self, values: Tensor) -> Tensor:
        """The elementwise maximum of what each shard has."""
        return values

    def any_over_shards(self, flag: Bool[Tensor, ""]) -> bool:
        """Whether the flag of any shard is set."""
        return bool(self.max_over_shards(flag))

    def gather_latents(self, values: Tensor) -> Tensor:
        """[held] values as [d_sae], in the order of the dictionary."""
        return values

    def part_of(self, values: Tensor) -> Tensor:
        """This process's [held] of [d_sae] values: undoes `gather_latents`."""
        return values

    def own(
        self, latents: Int[Tensor, " n"]
    ) -> tuple[slice | Int[Tensor, " own"], Int[Tensor, " own"]]:
        """Which of these latents of the dictionary are this shard's, and their places in it."""
        return slice(None), latents

    def std(self, values: Float[Tensor, "batch held"]) -> float:
        """The standard deviation over all latents, of tokens that every shard has."""
        return values.std().item()

    # ---------------------------------------------------------------- tokens

    def mean_over_replicas(self, values: Tensor) -> Tensor:
        """The mean of what each replica has. Its gradient reaches each replica's as it is."""
        return values

    def gather_tokens(self, values: Float[Tensor, "tokens ..."]) -> Float[Tensor, "batch ..."]:
        """A value of each of this process's tokens as one of each of the batch's, in its order."""
        return values

    def firings_of_batch(self, feature_acts: Float[Tensor, "tokens held"]) -> Tensor | None:
        """On how many tokens of the batch each latent is active, [held].

        None where the batch is here whole: whoever wants to know reads it off `feature_acts`.
        """
        return None

    def any_over_replicas(self, flags: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Elementwise, whether the flag of any replica is set."""
        return flags

    # ---------------------------------------------------------------- both

    def count_pairs(self, count: float | Tensor) -> float:
        """The sum of a count of (token, latent) pairs, on the host."""
        return float(count)

    def sum_counts(self, counts: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The sum of each of several counts of pairs, on the device; it may overwrite `counts`."""
        return counts

    def total(self, partial: Tensor) -> Tensor:
        """The sum over shards of the mean over replicas, without a gradient."""
        return partial

    def after_backward(self, partial: Tensor, use: Callable[[Tensor], None]) -> None:
        """Call `use` with the `total` of every process's `partial`, before the optimizer's step.

        A sum that is asked for before the end of a backward pass waits for it: processes must
        exchange values in one order, and gradients may arrive in another order on each.
        """
        use(partial)


ONE_PROCESS = OneProcess()
