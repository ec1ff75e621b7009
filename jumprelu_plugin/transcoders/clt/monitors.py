"""The alarms of `training.health` on a cross-layer transcoder in training, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from jumprelu_plugin.training.health.alarms import Alarm, Monitor, StepStats
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep, StepOutput


class LayerMonitors:
    """A monitor for each layer. An output's error counts as its own layer's."""

    def __init__(self, training_step: CLTTrainingStep, steps: int):
        cfg = training_step.cfg
        self._controls = training_step.controls
        self._monitors = [
            Monitor(
                source,
                steps,
                control=control,
                target_l0=cfg.target_l0,
                warm_up_steps=0 if cfg.controls_l0 else cfg.l0_warm_up_steps,
            )
            for source, control in zip(
                training_step.model.sources, training_step.controls, strict=True
            )
        ]

    def step(self, output: StepOutput, step: int) -> Iterator[tuple[int, Alarm]]:
        """Take in a step that was made; the alarms it raised, with their layer's place."""
        errors = output.errors(len(self._monitors)).unbind()
        for index, (monitor, error) in enumerate(zip(self._monitors, errors, strict=True)):
            firing = self._controls[index].firing
            assert firing is not None  # a cross-layer transcoder keeps one for every layer
            stats = StepStats(output.active[index], output.tokens, error)
            for alarm in monitor.step(stats, firing.silent, step):
                yield index, alarm

    def close(self) -> None:
        """Stop listening to the thresholds' gradients."""
        for monitor in self._monitors:
            monitor.close()
