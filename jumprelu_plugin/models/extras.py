"""Packages of an extra, with an error that says how to install them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require_extra(module: str, extra: str) -> Any:
    """Import `module`, which the extra `extra` installs.

    Raises:
        ImportError: it is not installed; the message gives the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is not installed: pip install 'jumprelu-plugin[{extra}]'"
        ) from error
