"""The alarms of `health.alarms` on a cross-layer transcoder in training, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from jumprelu_plugin.cross_layer.learner import Learner, Outcome
from jumprelu_plugin.training.health.alarms import Alarm, Glance, Watch


class _Layer:
    """One layer's latents, with the names that a training SAE has for the same things."""

    def __init__(self, learner: Learner, index: int):
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


class LayerWatches:
    """A watch for each layer. An output's error is judged as its own layer's."""

    def __init__(self, learner: Learner, steps: int):
        self._learner = learner
        sources = enumerate(learner.model.sources)
        self._watches = [
            Watch(_Layer(learner, index), steps, threshold=source.threshold)
            for index, source in sources
        ]

    def step(self, outcome: Outcome, step: int) -> Iterator[tuple[int, Alarm]]:
        """Take in a step that was made; the alarms it raised, with their layer's place."""
        tokens = len(outcome.target)
        errors = outcome.errors(len(self._watches)).unbind()
        for index, (watch, error) in enumerate(zip(self._watches, errors, strict=True)):
            seen = Glance(round(outcome.l0[index] * tokens), tokens, error)
            for alarm in watch.step(seen, self._learner.firing[index].silent, step):
                yield index, alarm

    def close(self) -> None:
        """Stop listening to the thresholds' gradients."""
        for watch in self._watches:
            watch.close()
