"""What one process has of a training, and how it reaches the rest: here it has everything.

A dictionary may be split over several processes by its latents: each holds a *shard* of them and
sees every token. What a step needs of the whole dictionary are a few sums over latents, written
once where they are taken, against the methods below. `OneProcess` gives every value back as it is.
`training.distributed` has the processes that exchange them.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor


class OneProcess:
    """A training in one process, which holds every latent."""

    def held(self, d_sae: int) -> int:
        """How many of the dictionary's latents this process holds."""
        return d_sae

    def sum_over_shards(self, partial: Tensor) -> Tensor:
        """The sum of every shard's `partial`. Its gradient reaches each shard's as it is."""
        return partial

    def count_over_shards(self, count: float | Tensor) -> float:
        """The sum of a count, on the host."""
        return float(count)

    def mean_over_shards(self, values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The mean over what all shards have, however many each."""
        return values.mean()

    def median_over_shards(
        self, values: Float[Tensor, " held"], where: Bool[Tensor, " held"]
    ) -> Float[Tensor, ""]:
        """The median over these latents of a value of each."""
        return values[where].median()

    def max_over_shards(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The elementwise maximum of what each shard has."""
        return values

    def any_over_shards(self, flag: Bool[Tensor, ""]) -> bool:
        """Whether the flag of any shard is set."""
        return bool(flag)

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
        """The standard deviation over all tokens and latents."""
        return values.std().item()

    def after_backward(self, partial: Tensor, use: Callable[[Tensor], None]) -> None:
        """Call `use` with the sum of every shard's `partial`, before the optimizer's step.

        A sum that is asked for inside a backward pass waits for its end: processes must exchange
        values in one order, and gradients arrive in another order on each.
        """
        use(partial)


ONE_PROCESS = OneProcess()
