"""How faithful and how sparse a dictionary is: streaming metrics, delta LM loss, reports."""

from jumprelu_plugin.evaluation.loss import LanguageModelLoss, delta_lm_loss, evaluated_positions
from jumprelu_plugin.evaluation.metrics import Metrics, StreamingMetrics
from jumprelu_plugin.evaluation.report import Evaluation, evaluate
from jumprelu_plugin.evaluation.splice import SplicedSet, evaluate_transcoders

__all__ = [
    "Evaluation",
    "LanguageModelLoss",
    "Metrics",
    "SplicedSet",
    "StreamingMetrics",
    "delta_lm_loss",
    "evaluate",
    "evaluate_transcoders",
    "evaluated_positions",
]
