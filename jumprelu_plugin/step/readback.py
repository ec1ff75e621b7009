"""Numbers that the host reads from the device, without waiting for what comes after them.

`Tensor.item()` waits until the device has done all it was given. The GPU then idles until the host
has given it more: 2.5 of 10 ms of a step at 16384 latents (H200). Here the copy is queued where the
numbers are ready, and the host waits for that copy alone, as late as it can.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor


class Readback:
    """A copy of a few numbers, on its way from the device to the host.

    Args:
        numbers: what is read; it may be changed afterwards.
    """

    def __init__(self, numbers: Shaped[Tensor, " n"]):
        numbers = numbers.detach()
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._numbers = numbers.to("cpu", copy=True)
            return
        self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[float]:
        """The numbers; this waits until they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
