"""A dictionary in the formats of the tools downstream: written, read back with their own loaders
and compared, and only then in its place.
"""

from jumprelu_plugin.export.checking import Check
from jumprelu_plugin.export.dictionary import Dictionary
from jumprelu_plugin.export.reading import read
from jumprelu_plugin.export.targets import TARGETS, Target, amounts, export, table

__all__ = ["TARGETS", "Check", "Dictionary", "Target", "amounts", "export", "read", "table"]
