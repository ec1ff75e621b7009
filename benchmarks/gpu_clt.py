"""A cross-layer transcoder whose whole step `benchmarks.gpu` times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jumprelu_plugin.transcoders.clt import CLTConfig, CLTTrainingConfig, CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep

STEP_KERNELS = ("sparse", "screened", "dense", "triton")


@dataclass(frozen=True)
class CLTShape:
    """Sizes of a cross-layer transcoder, inputs and outputs as wide as each other.

    Attributes:
        d_sae, l0: of each layer.
    """

    layers: int
    d_in: int
    d_sae: int
    batch: int
    l0: float
    device: str


class TimedCLT:
    """A cross-layer transcoder in training on Gaussian activations; see `trainers.TimedTrainer`."""

    def __init__(self, shape: CLTShape, step_kernel: str):
        cfg = CLTConfig(shape.d_in, shape.d_in, shape.d_sae, tuple(range(shape.layers)))
        model = CrossLayerTranscoder(cfg).to(shape.device)
        training = CLTTrainingConfig(target_l0=shape.l0, step_kernel=step_kernel)  # type: ignore[arg-type]
        self._training_step = CLTTrainingStep(model, training)
        # So low that L0 stays where calibration puts it.
        self._optimizer = torch.optim.Adam(model.parameters(), lr=1e-7)
        self._inputs, self._targets = _activations(shape, 0), _activations(shape, 1)
        self._l0: float | None = None

    def step(self) -> None:
        self.forward_backward()
        self._optimizer.step()

    def forward_backward(self) -> None:
        self._optimizer.zero_grad()
        output = self._training_step.loss(self._inputs, self._targets)
        output.loss.backward()
        self._l0 = sum(output.l0) / len(output.l0)

    def l0(self) -> float | None:
        return self._l0


def _activations(shape: CLTShape, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.d_in)
    return [torch.randn(size, generator=generator).to(shape.device) for _ in range(shape.layers)]
