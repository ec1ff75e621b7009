"""What a run will take and can reach, before it; what goes wrong in it, while it runs."""

from jumprelu_plugin.training.health.alarms import Alarm, Monitor
from jumprelu_plugin.training.health.findings import Finding
from jumprelu_plugin.training.health.preflight import Preflight, run_preflight

__all__ = ["Alarm", "Finding", "Preflight", "Monitor", "run_preflight"]
