"""JumpReLU sparse autoencoders in SAELens' training runners: faster, and at the L0 you ask for.

Importing the package registers it: `architecture="jumprelu"` then trains `JumpReLUTrainingSAE`.
Every name a user needs is listed in `__init__.pyi` and loaded when it is first asked for.
"""

import lazy_loader

from jumprelu_plugin.registration import register

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register()
