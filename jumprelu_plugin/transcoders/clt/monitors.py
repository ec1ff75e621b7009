"""The alarms of `health.alarms` on a cross-layer transcoder in training, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from jumprelu_plugin.training.health.alarms import Alarm, Monitor, StepStats
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep, StepOutput


class _Layer:
    """One layer's latents, with the names that a training SAE has for the same things."""

    def __init__(self, learner: CLTTrainingStep, index: int):
        self._learner, self._index = learner, index
        self._source = learner.model.sources[index]
        self.controller = learner.controllers[index] if learner.controllers else None
        self.cfg: Any = SimpleNamespace(
            d_sae=learner.model.cfg.d_sae,
            target_l0=learner.cfg.target_l0,
            l0_warm_up_steps=learner.cfg.l0_warm_up_steps,
        )

    @property
    def W_enc(self) -> Tensor:
        return self._source.W_enc.detach()

    @property
    def W_dec(self) -> Tensor:
        return self._source.W_dec.detach()

    @property
    def dtype(self) -> torch.dtype:
        return self._source.W_enc.dtype

    @property
    def bandwidth(self) -> float:
        return self._learner.bandwidths[self._index]


class LayerMonitors:
    """A monitor for each layer. An output's error is judged as its own layer's."""

    def __init__(self, learner: CLTTrainingStep, steps: int):
        self._learner = learner
        sources = enumerate(learner.model.sources)
        self._monitors = [
            Monitor(_Layer(learner, index), steps, threshold=source.threshold)
            for index, source in sources
        ]

    def step(self, outcome: StepOutput, step: int) -> Iterator[tuple[int, Alarm]]:
        """Take in a step that was made; the alarms it raised, with their layer's place."""
        tokens = len(outcome.target)
        errors = outcome.errors(len(self._monitors)).unbind()
        for index, (monitor, error) in enumerate(zip(self._monitors, errors, strict=True)):
            seen = StepStats(round(outcome.l0[index] * tokens), tokens, error)
            for alarm in monitor.step(seen, self._learner.firing[index].silent, step):
                yield index, alarm

    def close(self) -> None:
        """Stop listening to the thresholds' gradients."""
        for monitor in self._monitors:
            monitor.close()
