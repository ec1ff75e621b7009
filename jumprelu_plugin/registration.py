"""The only file that touches SAELens' registries.

`register()` makes `architecture="jumprelu"` train this package's class, in every runner of SAELens.
It replaces the *training* entry alone: what is saved is a stock `jumprelu` folder, and the entries
that load one for inference are never touched.
"""

from __future__ import annotations

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE

ARCHITECTURE = "jumprelu"
_OURS = (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
# What was there before us; None while we are not registered.
_replaced = None


def register() -> None:
    """Train this package's class for `architecture="jumprelu"`. Harmless to repeat."""
    global _replaced
    if is_registered():
        return
    _replaced = SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE]
    SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE] = _OURS


def unregister() -> None:
    """Give `architecture="jumprelu"` back to the class that had it. Harmless to repeat."""
    global _replaced
    if is_registered() and _replaced is not None:
        SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE] = _replaced
        _replaced = None


def is_registered() -> bool:
    """Whether `architecture="jumprelu"` trains this package's class now."""
    return SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE][0] is JumpReLUTrainingSAE
