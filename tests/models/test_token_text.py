"""Tokens as they stand in a text: spaces kept, characters of several tokens legible and found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from jumprelu_plugin.analysis.dashboard import write_dashboard
from jumprelu_plugin.models.language_models import embedded_model_folder
from jumprelu_plugin.models.token_text import TokenTexts
from tests.analysis.latents import Page
from tests.tiny import tiny_sae

TEXT = "The people of the country, peopled\nby 日本 😀 é  twice"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["▁", "▁The", "▁people", "people", "d", "▁of", "▁the", "▁country", ",", "▁by", "▁twice"]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama() -> PreTrainedTokenizerFast:
    """Llama 2's: BPE over `▁`, bytes for what it lacks, the first space stripped when decoding."""
    merged = [word for word in WORDS if len(word) > 1]
    pieces, merges = set(WORDS), []
    for word in merged:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1]
            pieces |= {left, right, left + right}
            merges.append((left, right))
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *BYTES, *sorted(pieces)])}
    backend = Tokenizer(
        models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(backend)


def unigram() -> PreTrainedTokenizerFast:
    """A sentencepiece Unigram model, whose Metaspace decoder drops the first `▁`."""
    pieces = [*SPECIAL, *BYTES, *WORDS]
    backend = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Metaspace()]
    )
    return wrapped(backend)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind. One merge joins the first two bytes of 日, another a space and a part of 本."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("æ", "Ĺ"), ("Ġ", "ð"), ("Ġ", "p"), ("Ġp", "e")]
    names = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped(backend)


KINDS = {"llama": llama, "unigram": unigram, "byte level": byte_level}


def encoded(tokenizer: Any, text: str = TEXT) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_put_together_are_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = encoded(tokenizer)
    # Tokenizers with `▁` put a space before the text, and that space is the first token's.
    first = "" if kind == "byte level" else " "
    assert TokenTexts(tokenizer).join(tokens) == first + TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_a_legible_text_of_its_own(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = sorted(set(encoded(tokenizer)))
    texts = [TokenTexts(tokenizer).text(token) for token in tokens]
    assert len(set(texts)) == len(tokens)
    assert all(texts) and not any("\ufffd" in text for text in texts)


def test_space_is_the_tokens_own() -> None:
    for tokenizer in (llama(), unigram()):
        texts = TokenTexts(tokenizer)
        names = tokenizer.get_vocab()
        assert texts.text(names["▁people"]) == " people"
        assert texts.text(names["people"]) == "people"
        assert texts.text(names["▁"]) == " "
        assert texts.text(names["<0x0A>"]) == "\n"
        assert texts.text(names["<0xE6>"]) == r"\xe6"
        assert texts.text(names["<s>"]) == "<s>"


def test_parts_of_characters_are_their_bytes() -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    assert [texts.text(t) for t in encoded(tokenizer, "日")] == [r"\xe6\x97", r"\xa5"]
    assert [texts.text(t) for t in encoded(tokenizer, " 😀")] == [
        r" \xf0", r"\x9f", r"\x98", r"\x80",
    ]  # fmt: skip


def test_token_of_the_replacement_character_is_not_taken_for_bytes() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "\ufffd": 1}, "<unk>"))
    assert TokenTexts(wrapped(backend)).text(1).strip() == "\ufffd"


def test_tokens_beyond_the_tokenizers_vocabulary_show_their_number() -> None:
    tokenizer = byte_level()
    assert TokenTexts(tokenizer).text(len(tokenizer) + 5) == f"<{len(tokenizer) + 5}>"


def test_embedded_models_tokens_are_unchanged() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(embedded_model_folder())
    texts = TokenTexts(tokenizer)
    for token in range(0, len(tokenizer), 7):
        decoded = tokenizer.decode([token])
        assert texts.text(token) == decoded or "\ufffd" in decoded


@pytest.mark.parametrize("kind", KINDS)
def test_page_shows_spaces_and_finds_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    config = HookedTransformerConfig(
        n_layers=1, d_model=33, n_ctx=80, d_head=11, n_heads=3, d_vocab=len(tokenizer),
        act_fn="gelu", seed=5,
    )  # fmt: skip
    model: Any = HookedTransformer(config)
    model.tokenizer = tokenizer
    sae = tiny_sae("blocks.0.hook_resid_post", d_in=33, d_sae=5)
    with torch.no_grad():
        sae.threshold.zero_()
    tokens = torch.tensor([encoded(tokenizer)])
    page = Page(write_dashboard(tmp_path / "p.html", model, sae, tokens, examples=20))
    words = page.data["words"]
    contexts = [context for latent in page.data["latents"] for context in latent.get("c", [])]
    shown = ["".join(words[number] for number in context[0]) for context in contexts]
    searched = [context[3] if len(context) == 4 else text
                for context, text in zip(contexts, shown, strict=True)]  # fmt: skip
    assert not any("\ufffd" in text for text in shown)
    for text in ("日本", "😀", "é"):
        assert any(text in found for found in searched)
    assert any(" p" in text for text in shown)
    # Only a context with a character in parts carries its text a second time.
    assert all(context[3] != text for context, text in zip(contexts, shown, strict=True)
               if len(context) == 4)  # fmt: skip
