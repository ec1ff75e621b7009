"""Over how many processes a run is divided, and what that makes of a pass of the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Division:
    """A run's processes, as far as one process needs to know them to count what it takes.

    Attributes:
        replicas: over which each batch is split.
        shards: over which the latents of each replica are split.
    """

    replicas: int = 1
    shards: int = 1

    @property
    def processes(self) -> int:
        """How many there are."""
        return self.replicas * self.shards

    def sequences(self, prompts: int, *, alone: bool) -> int:
        """Of a pass of so many sequences, those that one process runs the model on.

        Args:
            alone: whether each draws its own activations (`prefetch_llm_batches`).
        """
        return prompts if alone else share_of_pass(prompts, self.processes)


ALONE = Division()


def share_of_pass(prompts: int, processes: int) -> int:
    """Of a pass of so many sequences, those of one process: whole ones, so the last repeats."""
    return -(-prompts // processes)


def handed_over(tokens: int, prompts: int, size: int, width: int, element_size: int) -> int:
    """Bytes of activations that one of `size` processes sends the others for so many tokens.

    Args:
        prompts: sequences of a pass of the model, which all processes share.
        width: of the hooks that the others want, added up.
    """
    return tokens * share_of_pass(prompts, size) * width * element_size // prompts


def dictionary_parameters(d_in: int, d_out: int, d_sae: int, *, skips: bool = False) -> int:
    """Numbers of an SAE or a transcoder; with `skips`, of one with W_skip [d_out, d_in]."""
    return d_sae * (d_in + d_out + 2) + d_out + skips * d_in * d_out
