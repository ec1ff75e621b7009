"""How many pairs a step's entries activate, over all processes, and whether none is missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from jumprelu_plugin.step.entries import BufferOverflow, Entries
from jumprelu_plugin.step.processes import OneProcess
from jumprelu_plugin.step.readback import Readback


class PairCount:
    """The active pairs of one step's entries; begin it as soon as it is known which are active.

    The sums and their copy to the host are queued here, and the device goes on meanwhile. All
    processes count together, whichever entries each has: those in buffers of a fixed size
    (`step.kernels`) may have left pairs out, and then all compute the step again.

    Args:
        entries: of each dictionary in the step.
        active: which of each one's are active, as `Entries.as_matrix` will be given them.
        processes: that hold the other latents and tokens of the step.
    """

    def __init__(
        self,
        entries: Sequence[Entries],
        active: Sequence[Bool[Tensor, "*entries"]],
        processes: OneProcess,
    ):
        self._entries = entries
        own = [each.counts(mask) for each, mask in zip(entries, active, strict=True)]
        self._sizes = [len(counts) for counts in own]
        shared = processes.sum_counts(torch.stack([counts[:2] for counts in own]))
        self._numbers = Readback(torch.cat((shared.flatten(), *own)))

    def finish(self) -> list[int]:
        """The active pairs of each dictionary, of all processes; call it before anything is kept.

        Raises:
            BufferOverflow: a buffer was too small, here or in another process, and has grown;
                compute the step again.
        """
        numbers = [int(number) for number in self._numbers.tolist()]
        shared, own = numbers[: 2 * len(self._sizes)], numbers[2 * len(self._sizes) :]
        for entries, size in zip(self._entries, self._sizes, strict=True):
            entries.take_counts(own[:size])
            own = own[size:]
        pairs, overflows = shared[0::2], shared[1::2]
        if any(overflows):
            raise BufferOverflow(f"in {sum(overflows)} buffers")
        return pairs
