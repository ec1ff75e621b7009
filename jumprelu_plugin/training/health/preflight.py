"""A look at a run before its first hour is spent: what it will take, and what it can reach.

Takes a forward pass of the model and one step of a copy of the SAE. The run that follows is the one
it would have been: the activations are read apart from its stream, and the random state is left as
it was.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.resolved import ResolvedConfig
from jumprelu_plugin.training.distributed.division import ALONE, Division
from jumprelu_plugin.training.health.findings import (
    Finding,
    first_step_findings,
    memory_findings,
    precision_findings,
)
from jumprelu_plugin.training.health.first_step import (
    FirstStep,
    ThresholdReach,
    first_step,
    threshold_reach,
)
from jumprelu_plugin.training.health.memory import (
    MemoryForecast,
    forecast,
    size,
    usual_entries,
)
from jumprelu_plugin.training.health.sample import first_rows, scaled
from jumprelu_plugin.training.health.saving import saving_forecast
from jumprelu_plugin.training.health.schedule import (
    lr_sum,
    schedule_findings,
    steps_taken,
    total_steps,
)

# Tokens that are looked at: a batch of the run, within these.
FEWEST_TOKENS, MOST_TOKENS = 512, 4096

_STYLES = {"refused": "bold red", "repaired": "cyan", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True)
class Preflight:
    """What was found out about a run before it starts.

    Attributes:
        steps: how many it has.
        lr: its learning rate.
        memory: what it takes at its peak.
        first: its first step; None for another architecture than JumpReLU, and where a run is
            resumed.
        threshold_reach: how far a threshold can get.
        findings: what follows, the worst first.
        resolved: what the config's optional fields mean in this run; None for another architecture.
        saving: what the first of several processes takes on its host when it saves; None for one.
    """

    steps: int
    lr: float
    memory: MemoryForecast | None
    first: FirstStep | None
    threshold_reach: ThresholdReach | None
    findings: tuple[Finding, ...]
    resolved: ResolvedConfig | None = None
    saving: MemoryForecast | None = None

    def with_findings(self, more: Iterable[Finding]) -> Preflight:
        """The same with these as well."""
        return dataclasses.replace(self, findings=_ranked([*more, *self.findings]))

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def refuse(self) -> None:
        """Raise ValueError if the run should not start, with what to change."""
        refused = self.of("refused")
        if refused:
            raise ValueError("\n".join(map(str, refused)))

    def table(self) -> Table:
        """For the console."""
        table = named_rows(f"Before {self.steps:,} steps", self._numbers())
        table.add_section()
        if self.resolved is not None:
            for name, value in self.resolved.described().items():
                table.add_row(name, value)
            table.add_section()
        for finding in self.findings:
            table.add_row(f"[{_STYLES[finding.severity]}]{finding.severity}[/]", str(finding))
        if not self.findings:
            table.add_row("[green]ready[/]", "nothing to change")
        return table

    def _numbers(self) -> list[tuple[str, str]]:
        rows = [("learning rate", f"{self.lr:g}")]
        if self.memory is not None:
            rows.append(("peak memory", _described(self.memory, "gradients and Adam")))
        if self.saving is not None:
            rows.append(("the first saves", _described(self.saving, "Adam")))
        found, reach = self.first, self.threshold_reach
        if found is None or reach is None:
            return rows
        low, high = found.l0_in_reach
        return [
            *rows,
            ("pre-activations", f"spread {found.spread:.3g}, over {found.tokens:,} tokens"),
            ("L0 at the start", f"{found.l0:.1f} (at θ = 0: {found.most_l0:.1f})"),
            (
                "window",
                f"ε {found.bandwidth:.3g}, {found.bandwidth / found.spread:.2g} spreads; "
                f"{found.occupancy:.2%} of the tokens train a threshold "
                f"(median latent {found.median_occupancy:.2%})",
            ),
            (
                "θ can move",
                f"{reach.up / found.spread:+.2g} and -{reach.down / found.spread:.2g} spreads from "
                f"{found.threshold:.3g} by learning rate, L0 {low:.1f} to {high:.1f}"
                + (
                    f"; the controller shifts it by up to {reach.shift / found.spread:.2g} more"
                    if reach.shift
                    else ""
                ),
            ),
            *self._penalty(found),
        ]

    def _penalty(self, found: FirstStep) -> list[tuple[str, str]]:
        if found.penalty_dominates is None or found.error_dominates is None:
            return []
        return [
            (
                "penalty",
                f"pulls ten times as hard as the error at {found.penalty_dominates:.0%} of the "
                f"thresholds, a tenth as hard at {found.error_dominates:.0%}",
            )
        ]


def _described(memory: MemoryForecast, optimizer: str) -> str:
    room = memory.available
    parts = (
        ("there now", memory.there),
        (optimizer, memory.optimizer),
        ("mixing buffer", memory.buffer),
        (memory.moment, memory.working),
    )
    return (
        f"{size(memory.peak)} on {memory.device}"
        + ("" if room is None else f" of {size(room)}")
        + f" ({', '.join(f'{name} {size(part)}' for name, part in parts)})"
    )


def named_rows(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Numbers and their names, for the console."""
    table = Table(title=title, show_header=False, expand=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def run_preflight(
    cfg: Any,
    sae: Any,
    store: ActivationsStore | None,
    *,
    scaler: ActivationScaler | None = None,
    repairs: Sequence[Finding] = (),
    division: Division = ALONE,
) -> Preflight:
    """Look at a run that is about to start; none of what is handed in is changed.

    Args:
        cfg: SAELens' runner config.
        sae: what will be trained; of several processes, one shard as a dictionary of its own.
        store: where its activations come from; it stays where it is. None: they are not looked at.
        scaler: how they will be scaled; SAELens' by default.
        repairs: what was already changed to make the run possible.
        division: over processes; memory is that of one.

    Raises:
        ValueError: there is no text, or its activations are NaN, infinite or all the same.
    """
    findings = [*repairs, *schedule_findings(cfg)]
    steps = total_steps(cfg)
    found, reach = None, None
    resumed = cfg.resume_from_checkpoint is not None
    if steps and store is not None and isinstance(sae, JumpReLUTrainingSAE) and not resumed:
        tokens = min(max(cfg.train_batch_size_tokens, FEWEST_TOKENS), MOST_TOKENS)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            rows = first_rows(store, cfg, tokens).to(sae.device)
            fresh = copy.deepcopy(scaler) if scaler is not None else ActivationScaler()
            far = lr_sum(cfg)
            found = first_step(sae, scaled(rows, sae.cfg, fresh), far, steps)
        reach = threshold_reach(sae, found.threshold, found.bandwidth, far, steps)
        findings += first_step_findings(sae, found, cfg, reach)
    if isinstance(sae, JumpReLUTrainingSAE):
        findings += precision_findings(sae, cfg.lr, found)
    target = getattr(sae.cfg, "target_l0", None)
    usual = usual_entries(cfg.train_batch_size_tokens, sae.cfg.d_sae, target)
    model = None if store is None else store.model
    width = sae.cfg.d_in + (getattr(sae.cfg, "width_out", 0) if _is_pair(sae) else 0)
    saves_buffer = getattr(store, "save_buffer", False)
    memory = forecast(
        cfg,
        sae,
        model,
        entries=usual if found is None else found.entries,
        calibrates=not resumed and not getattr(sae, "calibrated", True),
        width=width,
        division=division,
        saves_buffer=saves_buffer,
    )
    saving = saving_forecast(
        cfg, sae, model, width=width, division=division, saves_buffer=saves_buffer
    )
    findings += memory_findings(memory)
    findings += [] if saving is None else memory_findings(saving)
    resolved = getattr(sae, "resolved", None)
    return Preflight(
        steps_taken(cfg), cfg.lr, memory, found, reach, _ranked(findings), resolved, saving
    )


def _ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first."""
    order = list(_STYLES)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def _is_pair(sae: Any) -> bool:
    return "transcoder" in sae.cfg.architecture()
