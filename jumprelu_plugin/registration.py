"""Registers this package's training classes with SAELens. Only this file changes its registries.

After `register()`, every SAELens runner trains this package's class for `architecture="jumprelu"`,
and can train `jumprelu_transcoder` and `jumprelu_skip_transcoder`, which SAELens can only load.
Only *training* entries change. Trained dictionaries are saved as stock folders, and SAELens loads
them for inference with its own classes.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

from packaging.version import Version
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

_CLASSES: dict[str, tuple[Any, Any]] = {
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "jumprelu_transcoder": (JumpReLUTrainingTranscoder, JumpReLUTrainingTranscoderConfig),
    "jumprelu_skip_transcoder": (
        JumpReLUTrainingSkipTranscoder,
        JumpReLUTrainingSkipTranscoderConfig,
    ),
}
# The oldest version that tools/oldest_env.sh tests, and the newest, of constraints.txt.
TESTED_VERSIONS = {
    "sae-lens": ("6.54.2", "6.54.12"),
    "transformer-lens": ("3.9.0", "3.9.0"),
}
# The entries that `register` replaced; None where there was none. Empty while not registered.
_replaced: dict[str, Any] = {}


def register() -> None:
    """Make SAELens train this package's classes. Repeated calls have no effect.

    Warns once of a version of SAELens or TransformerLens that this package was not tested with.
    """
    _warn_of_untested_versions()
    for architecture, classes in _CLASSES.items():
        entry = SAE_TRAINING_CLASS_REGISTRY.get(architecture)
        if entry != classes:
            _replaced[architecture] = entry
            SAE_TRAINING_CLASS_REGISTRY[architecture] = classes


def unregister() -> None:
    """Restore the entries that `register` replaced. Repeated calls have no effect."""
    for architecture, entry in _replaced.items():
        if SAE_TRAINING_CLASS_REGISTRY.get(architecture) != _CLASSES[architecture]:
            continue
        if entry is None:
            del SAE_TRAINING_CLASS_REGISTRY[architecture]
        else:
            SAE_TRAINING_CLASS_REGISTRY[architecture] = entry
    _replaced.clear()


def is_registered() -> bool:
    """Whether SAELens trains this package's classes."""
    return all(
        SAE_TRAINING_CLASS_REGISTRY.get(name) == classes for name, classes in _CLASSES.items()
    )


@cache
def _warn_of_untested_versions() -> None:
    for name, (oldest, newest) in TESTED_VERSIONS.items():
        found = version(name)
        if Version(oldest) <= Version(found) <= Version(newest):
            continue
        tested = oldest if oldest == newest else f"{oldest} to {newest}"
        warnings.warn(
            f"{name} {found} is installed, and jumprelu-plugin was tested with {tested}. If "
            f"training fails or differs, install a tested version: pip install {name}=={newest}",
            stacklevel=3,
        )
