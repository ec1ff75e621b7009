"""What is added up at each output while a forward pass goes up through the layers."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor


class RunningOutputs:
    """The outputs of a cross-layer transcoder, ŷ_m = Σ_{l ≤ m} f_l W_dec_{l→m}, without biases.

    Layer l is taken in when its latents are known, the first layer first. What it writes to later
    layers waits for them, so that only outputs that are not yet complete are held. Training adds
    all at once, with a gradient (`clt.forward`).
    """

    def __init__(self) -> None:
        self._incomplete: dict[int, Tensor] = {}

    def take(
        self, layer: int, written: Iterable[Float[Tensor, "*n d_out"]]
    ) -> Float[Tensor, "*n d_out"]:
        """Take in the next layer; return its output, to which no more will be added.

        Args:
            layer: its place, counted from 0.
            written: what its latents add to its own output and to each later one, in order.
        """
        for output, part in enumerate(written, start=layer):
            before = self._incomplete.get(output)
            self._incomplete[output] = part if before is None else before + part
        return self._incomplete.pop(layer)
