"""What the preflight has to say: one fact about a run each, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# `refused`: the run cannot do what it is for. `repaired`: it has been changed so that it can.
# `warning`: it will run, and likely disappoint. `note`: good to know.
Severity = Literal["refused", "repaired", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One fact about a run that should be known before it starts.

    Attributes:
        name: a short, fixed word for it.
        says: what was given or measured, and what follows from it.
        change: what to do.
    """

    severity: Severity
    name: str
    says: str
    change: str = ""

    def __str__(self) -> str:
        return f"{self.says}: {self.change}" if self.change else self.says
