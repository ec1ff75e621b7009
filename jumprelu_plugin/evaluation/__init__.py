"""How faithful and how sparse a dictionary is: streaming metrics, delta LM loss, reports."""

from jumprelu_plugin.evaluation.loss import LanguageModelLoss, delta_lm_loss
from jumprelu_plugin.evaluation.metrics import Metrics, StreamingMetrics
from jumprelu_plugin.evaluation.report import Evaluation, evaluate
from jumprelu_plugin.evaluation.spliced_set import SplicedSet, evaluate_transcoders
from jumprelu_plugin.evaluation.splicing import evaluated_positions

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
