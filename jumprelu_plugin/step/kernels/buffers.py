"""How much room for pairs a step allocates before it knows how many there are."""

from __future__ import annotations

from dataclasses import dataclass

# Pairs a token that the first step has room for.
FIRST_PAIRS_PER_TOKEN = 256
# Room beyond the candidates of the last step, and how much of it may stay unused.
GROWTH, MOST_UNUSED = 1.5, 4.0
# Sizes are multiples of this, so that memory is reused from step to step.
GRAIN = 2**12


@dataclass
class PairBuffers:
    """The size of one dictionary's buffers of pairs.

    Attributes:
        capacity: pairs that the next step has room for; 0 before the first step.
    """

    capacity: int = 0

    def room(self, batch: int, d_sae: int) -> int:
        """The pairs a step of these sizes has room for."""
        if not self.capacity:
            self.capacity = _rounded_up(min(FIRST_PAIRS_PER_TOKEN, d_sae) * batch)
        return self.capacity

    def adapt(self, candidates: int) -> None:
        """Size the next step's buffers by what a step found."""
        wanted = _rounded_up(int(GROWTH * candidates))
        if candidates > self.capacity / GROWTH**0.5 or self.capacity > MOST_UNUSED * wanted:
            self.capacity = wanted


def _rounded_up(pairs: int) -> int:
    return max(1, -(-pairs // GRAIN)) * GRAIN
