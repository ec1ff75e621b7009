"""The only file that touches SAELens' registries.

`register()` makes `architecture="jumprelu"` train this package's class, in every runner of SAELens,
and gives `jumprelu_transcoder` and `jumprelu_skip_transcoder`, which SAELens can only load, a class
to train. It touches *training* entries alone: what is saved is a stock folder, and the entries that
load one for inference are never touched.
"""

from __future__ import annotations

from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)

_OURS: dict[str, tuple[Any, Any]] = {
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "jumprelu_transcoder": (JumpReLUTrainingTranscoder, JumpReLUTrainingTranscoderConfig),
    "jumprelu_skip_transcoder": (
        JumpReLUTrainingSkipTranscoder,
        JumpReLUTrainingSkipTranscoderConfig,
    ),
}
# What was there before us, None for an architecture nobody trained; empty while not registered.
_replaced: dict[str, Any] = {}


def register() -> None:
    """Train this package's classes for its architectures. Harmless to repeat."""
    for architecture, ours in _OURS.items():
        entry = SAE_TRAINING_CLASS_REGISTRY.get(architecture)
        if entry != ours:
            _replaced[architecture] = entry
            SAE_TRAINING_CLASS_REGISTRY[architecture] = ours


def unregister() -> None:
    """Give the architectures back to the classes that had them. Harmless to repeat."""
    for architecture, entry in _replaced.items():
        if SAE_TRAINING_CLASS_REGISTRY.get(architecture) != _OURS[architecture]:
            continue
        if entry is None:
            del SAE_TRAINING_CLASS_REGISTRY[architecture]
        else:
            SAE_TRAINING_CLASS_REGISTRY[architecture] = entry
    _replaced.clear()


def is_registered() -> bool:
    """Whether the architectures train this package's classes now."""
    return all(SAE_TRAINING_CLASS_REGISTRY.get(name) == ours for name, ours in _OURS.items())
