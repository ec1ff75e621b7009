"""SAELens' runner flags, read into its config; a wrong flag is an error of one line.

SAELens' own parser answers a wrong flag with its whole usage, and a wrong value with a traceback.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args


def parse_flags(flags: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """The config that `flags` describe; the last of a repeated flag counts.

    Raises:
        ValueError: an unknown flag or architecture, or a value that a flag cannot hold.
        SystemExit: with code 0, after `--help` has been printed.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return _parse_cfg_args(flags)
    except argparse.ArgumentError as error:
        message = str(error)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = said.getvalue().rpartition("error: ")[2].strip()
    raise ValueError(f"{message}; `jumprelu train --help` lists the flags and what they take")
