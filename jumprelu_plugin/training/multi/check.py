"""What is found out about a run over several dictionaries before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from jumprelu_plugin.training.health.findings import Finding, memory_findings
from jumprelu_plugin.training.health.memory import MemoryForecast, size
from jumprelu_plugin.training.health.preflight import Preflight


@dataclass(frozen=True)
class MultiCheck:
    """The check of each dictionary, and of the memory that all take together.

    Attributes:
        dictionaries: by name; `memory` is None in each.
        memory: of the run.
    """

    dictionaries: Mapping[str, Preflight]
    memory: MemoryForecast

    def of(self, severity: str) -> list[tuple[str, Finding]]:
        """The findings of one severity, each with its dictionary's name; "" is that of all."""
        found = [
            (name, finding)
            for name, check in self.dictionaries.items()
            for finding in check.of(severity)
        ]
        together = memory_findings(self.memory)
        return found + [("", finding) for finding in together if finding.severity == severity]

    def refuse(self) -> None:
        """Raise ValueError if the run should not start, with what to change."""
        refused = self.of("refused")
        if refused:
            raise ValueError(
                "\n".join(f"{name}: {one}" if name else str(one) for name, one in refused)
            )

    def tables(self) -> list[Table]:
        """For the console, one a dictionary."""
        tables = []
        for name, check in self.dictionaries.items():
            table = check.table()
            table.title = f"{name}: {str(table.title).lower()}"
            tables.append(table)
        return tables

    def __str__(self) -> str:
        memory = self.memory
        parts = (
            ("there now", memory.there),
            ("gradients and Adam", memory.optimizer),
            ("mixing buffer", memory.buffer),
            (memory.moment, memory.working),
        )
        room = "" if memory.available is None else f" of {size(memory.available)}"
        return (
            f"peak memory: {size(memory.peak)} on {memory.device}{room} "
            f"({', '.join(f'{name} {size(part)}' for name, part in parts)})"
        )
