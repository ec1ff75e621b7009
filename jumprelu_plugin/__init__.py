"""JumpReLU sparse autoencoders in SAELens' training runners: faster, and at the L0 you ask for.

Importing the package registers it: `architecture="jumprelu"` then trains `JumpReLUTrainingSAE`.
"""

from jumprelu_plugin.registration import is_registered, register, unregister
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE

__version__ = "0.1.0"

__all__ = [
    "JumpReLUTrainingSAE",
    "JumpReLUTrainingSAEConfig",
    "is_registered",
    "register",
    "unregister",
]

register()
