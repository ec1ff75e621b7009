"""A cross-layer transcoder of random weights and a batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jumprelu_plugin.transcoders.clt import CLTConfig, CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep

D_IN, D_OUT, D_SAE, LAYERS, BATCH = 13, 11, 53, 3, 37


def random_clt(
    d_in: int = D_IN, d_out: int = D_OUT, *, seed: int = 3, **fields: Any
) -> CrossLayerTranscoder:
    """Random parameters; thresholds from 0.3 to 1.3, on z of spread about 1."""
    cfg = CLTConfig(d_in, d_out, D_SAE, tuple(range(LAYERS)), **fields)
    model = CrossLayerTranscoder(cfg)
    generator = torch.Generator().manual_seed(seed)
    scales = {"W_enc": d_in**-0.5, "W_dec": 0.2, "b_enc": 0.3, "b_dec": 0.7}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind == "threshold":
                parameter.copy_(0.3 + torch.rand(parameter.shape, generator=generator))
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scales[kind] * noise)
    return model


def random_batch(seed: int = 5, batch: int = BATCH) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, D_IN, generator=generator) for _ in range(LAYERS)]
    return inputs, [torch.randn(batch, D_OUT, generator=generator) + 0.3 for _ in range(LAYERS)]


def set_bandwidths(training_step: CLTTrainingStep, bandwidths: list[float]) -> None:
    """As a checkpoint would: nothing is calibrated then."""
    state = training_step.state()
    for control, bandwidth in zip(state["controls"], bandwidths, strict=True):
        control["bandwidth"] = bandwidth
    training_step.load_state(state, training_step.tensors())
