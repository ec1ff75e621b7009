"""Windows as readable text: pieces of whole characters, each with its activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jumprelu_plugin.analysis.windows import WindowKind, Windows
from jumprelu_plugin.models.token_text import TokenTexts


@dataclass(frozen=True)
class TextWindow:
    """A window as text.

    Attributes:
        kind: why the window was chosen.
        pieces: the texts of tokens, joined where several tokens make up one character.
        activations: the latent's activation on each piece; the largest of a joined piece's tokens.
    """

    kind: WindowKind
    pieces: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def text(self) -> str:
        """The pieces put together."""
        return "".join(self.pieces)


def text_windows(windows: Windows, tokenizer: Any) -> list[list[TextWindow]]:
    """The windows of each latent as text, without special tokens.

    Args:
        windows: the windows.
        tokenizer: of the model that the text was tokenized for.
    """
    texts, special = TokenTexts(tokenizer), set(tokenizer.all_special_ids)
    found: list[list[TextWindow]] = []
    for row in range(len(windows.latents)):
        own: list[TextWindow] = []
        for column, kind in enumerate(windows.kind[row].tolist()):
            if kind == WindowKind.NONE:
                continue
            inside = windows.inside[row, column]
            tokens = windows.tokens[row, column][inside].tolist()
            values = windows.activation[row, column][inside].tolist()
            pairs = [(t, v) for t, v in zip(tokens, values, strict=True) if t not in special]
            pieces = _pieces(pairs, texts)
            if pieces:
                own.append(TextWindow(WindowKind(kind), *map(tuple, zip(*pieces, strict=True))))
        found.append(own)
    return found


def _pieces(pairs: list[tuple[int, float]], texts: TokenTexts) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    pending, largest = b"", 0.0
    for token, value in pairs:
        pending, largest = pending + texts.utf8(token), max(largest, value)
        try:
            text = pending.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            text = pending.decode("utf-8", errors="backslashreplace")
        pieces.append((text, largest))
        pending, largest = b"", 0.0
    if pending:
        pieces.append((pending.decode("utf-8", errors="backslashreplace"), largest))
    return pieces
