"""Dictionaries in the formats of other tools, one file a format.

A format that holds a dictionary has `LOADER` (the loader of its tool), `is_format` and `read` if it
can be read, `write`, and `check`, which compares an export with what its tool's loader reads.
"""

from jumprelu_plugin.formats.checking import Check
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.reading import load_dictionary
from jumprelu_plugin.formats.targets import TARGETS, Target, export, pair_amounts, target_table

__all__ = [
    "TARGETS",
    "Check",
    "Dictionary",
    "Target",
    "export",
    "load_dictionary",
    "pair_amounts",
    "target_table",
]
