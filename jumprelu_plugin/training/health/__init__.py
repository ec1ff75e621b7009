"""What a run will take and can reach, before it; what goes wrong in it, while it runs."""

from jumprelu_plugin.training.health.alarms import Alarm, Watch
from jumprelu_plugin.training.health.finding import Finding
from jumprelu_plugin.training.health.preflight import Preflight, preflight

__all__ = ["Alarm", "Finding", "Preflight", "Watch", "preflight"]
