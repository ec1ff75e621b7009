"""Text from outside that can be written to files and pages."""

from __future__ import annotations


def as_utf8(text: str) -> str:
    """The text with a question mark for each lone surrogate, which UTF-8 has no form for.

    JSON can hold one, so a browser or an endpoint can send it.
    """
    return text.encode("utf-8", errors="replace").decode()
