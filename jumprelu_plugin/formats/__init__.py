"""A dictionary in the formats of the tools downstream: written, read back with their own loaders
and compared, and only then in its place.
"""

from jumprelu_plugin.formats.checking import Check
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.reading import load_dictionary
from jumprelu_plugin.formats.targets import TARGETS, Target, amounts, export, table

__all__ = [
    "TARGETS",
    "Check",
    "Dictionary",
    "Target",
    "amounts",
    "export",
    "load_dictionary",
    "table",
]
