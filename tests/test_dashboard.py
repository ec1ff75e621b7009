"""The page of a dictionary: right numbers, safe text, nothing from the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HEADS, MLP, RESIDUAL, Tiny, tiny_models, tiny_sae, tiny_tokens
from transformer_lens import HookedTransformer, HookedTransformerConfig
from typer.testing import CliRunner

from jumprelu_plugin.analysis.contexts import collect_contexts
from jumprelu_plugin.analysis.dashboard import write_dashboard
from jumprelu_plugin.analysis.logit_lens import all_logit_effects, logit_effects
from jumprelu_plugin.analysis.neighbors import nearest_latents
from jumprelu_plugin.analysis.top_activations import TOP, collect_top_activations
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.models.token_text import TokenTexts

SPECIAL = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return tiny_tokens(sequences=23, positions=19)


def activations(tiny: Tiny, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[sequence, position, d_sae], special tokens at zero, by the plain route."""
    _, cache = tiny.hooked.run_with_cache(tokens)
    acts = sae.encode(cache[sae.cfg.metadata.hook_name]).detach()
    acts[torch.isin(tokens, torch.tensor(SPECIAL))] = 0.0
    return acts


class Page(HTMLParser):
    """Tags, attributes and the data of a page, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


# ---------------------------------------------------------------- the numbers


def test_contexts_are_the_activations_around_the_strongest_tokens(tiny, tokens) -> None:
    sae = tiny_sae(RESIDUAL)
    acts = activations(tiny, sae, tokens)
    found = collect_top_activations(
        tiny.hooked, sae, tokens, batch_size=7, special_token_ids=SPECIAL
    )
    before, after, bins = 5, 3, 11
    read = collect_contexts(
        tiny.hooked, sae, found, count=4, before=before, after=after, bins=bins, batch_size=5,
        special_token_ids=SPECIAL,
    )  # fmt: skip
    assert read.tokens.shape == (41, 4, before + after + 1) and read.focus == before
    length = tokens.shape[1]
    for latent in range(41):
        own = acts[..., latent]
        covered: list[tuple[int, int]] = []
        expected = []
        for value, place in zip(found.activation[latent], found.position[latent], strict=True):
            row, column = divmod(int(place), length)
            near = any(r == row and -before <= column - c <= after for r, c in covered)
            if value > 0 and not near:
                covered.append((row, column))
                expected.append((row, column))
        for rank in range(4):
            if rank >= len(expected):
                assert not read.inside[latent, rank].any()
                continue
            row, column = expected[rank]
            start, end = max(0, column - before), min(length, column + after + 1)
            inside = read.inside[latent, rank]
            assert int(inside.sum()) == end - start
            assert torch.equal(read.tokens[latent, rank][inside], tokens[row, start:end])
            torch.testing.assert_close(
                read.activation[latent, rank][inside], own[row, start:end], rtol=1e-4, atol=1e-5
            )
        fired = own[own > 0]
        assert int(read.histogram[latent].sum()) == len(fired)
        if len(fired):
            wanted = torch.histc(fired, bins, 0.0, float(found.activation[latent, 0]))
            assert int((read.histogram[latent] - wanted.long()).abs().sum()) <= 2  # bin edges
    assert TOP > 4


def test_logit_effects_of_all_agree_with_one(tiny) -> None:
    sae = tiny_sae(MLP)
    effects = all_logit_effects(tiny.hooked, sae, count=5)
    for latent in (0, 17, 40):
        raised, by = logit_effects(tiny.hooked, sae, latent, count=5)
        assert torch.equal(effects.raised[latent], raised)
        torch.testing.assert_close(effects.raised_by[latent], by)
        sae.W_dec.data[latent] *= -1
        lowered, by = logit_effects(tiny.hooked, sae, latent, count=5)
        assert torch.equal(effects.lowered[latent], lowered)
        torch.testing.assert_close(effects.lowered_by[latent], -by)
    with pytest.raises(ValueError, match="residual stream"):
        all_logit_effects(tiny.hooked, tiny_sae(HEADS))


def with_layer_norm() -> HookedTransformer:
    """A model whose final norm centres, and has a gain and a bias."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=33, n_ctx=19, d_head=11, n_heads=3, d_vocab=53, act_fn="gelu",
            normalization_type="LN", seed=5,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for parameter in (model.ln_final.w, model.ln_final.b):
        parameter.data += torch.randn(33, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["hooked", "bridge", "layer norm"])
def test_logit_effects_are_the_final_norms_and_unembeddings_own(tiny, kind: str) -> None:
    """Against their derivative, at a residual that the direction leaves as long as it is."""
    model = with_layer_norm() if kind == "layer norm" else getattr(tiny, kind)
    sae = tiny_sae(MLP)
    for latent in (3, 31):
        direction = sae.W_dec[latent].detach()
        changes = direction - direction.mean() if kind == "layer norm" else direction
        x = torch.randn(33, generator=torch.Generator().manual_seed(latent))
        x -= x.mean()
        x -= (x @ changes) / changes.square().sum() * changes
        _, effect = torch.func.jvp(
            lambda at: model.unembed(model.ln_final(at[None, None]))[0, 0], (x,), (direction,)
        )
        expected = (effect * x.square().mean().sqrt()).topk(5)
        raised, by = logit_effects(model, sae, latent, count=5)
        assert torch.equal(raised, expected.indices)
        torch.testing.assert_close(by, expected.values, rtol=1e-3, atol=1e-5)


def test_nearest_decoder_rows() -> None:
    rows = torch.randn(1031, 17, generator=torch.Generator().manual_seed(3))  # more than a chunk
    rows[1029] = -3.0 * rows[5]
    rows[7] = 2.5 * rows[1030]
    rows[11] = 0.0
    indices, cosines = nearest_latents(rows, count=3)
    assert indices.shape == (1031, 3)
    assert int(indices[7, 0]) == 1030 and int(indices[1030, 0]) == 7
    assert not (indices == torch.arange(1031)[:, None]).any()
    assert 1029 not in indices[5].tolist()
    assert not cosines[11].any()
    wanted = torch.nn.functional.cosine_similarity(rows[100], rows[int(indices[100, 1])], dim=0)
    torch.testing.assert_close(cosines[100, 1], wanted)
    assert nearest_latents(rows[:3], count=5)[0].shape == (3, 2)


# ---------------------------------------------------------------- the page


def test_page_holds_every_latents_numbers(tiny, tokens, tmp_path: Path) -> None:
    sae = tiny_sae(RESIDUAL)
    with torch.no_grad():
        sae.threshold[13] = 1e6  # never fires
    path = write_dashboard(tmp_path / "new" / "page.html", tiny.hooked, sae, tokens, examples=3)
    data = Page(path).data
    acts = activations(tiny, sae, tokens)
    texts = TokenTexts(tiny.tokenizer)
    counted = int((~torch.isin(tokens, torch.tensor(SPECIAL))).sum())
    assert [entry["i"] for entry in data["latents"]] == list(range(41))
    for entry in data["latents"]:
        own = acts[..., entry["i"]]
        assert entry["f"] == pytest.approx(float((own > 0).sum()) / counted, rel=5e-3)
        assert entry["m"] == pytest.approx(float(own.max()), rel=5e-3)
        assert len(entry["k"][0]) == 5
        if entry["i"] == 13:
            assert "c" not in entry and "h" not in entry
            continue
        assert sum(entry["h"]) == int((own > 0).sum())
        words, values, focus = entry["c"][0]
        row, column = divmod(int(own.argmax()), tokens.shape[1])
        assert data["words"][words[focus]] == texts.text(int(tokens[row, column]))
        assert values[focus] == entry["m"] == max(values)
        raised, by = logit_effects(tiny.hooked, sae, entry["i"])
        assert [data["words"][n] for n in entry["u"][0]] == [
            texts.text(token) for token in raised.tolist()
        ]
        assert entry["u"][1] == pytest.approx(by.tolist(), rel=5e-3, abs=1e-6)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_page_of_heads_has_no_logit_effects(tiny, tokens, tmp_path: Path) -> None:
    page = Page(write_dashboard(tmp_path / "p.html", tiny.hooked, tiny_sae(HEADS), tokens))
    assert all("u" not in entry for entry in page.data["latents"])


def test_chosen_latents(tiny, tokens, tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    write_dashboard(path, tiny.hooked, tiny_sae(), tokens, latents=[29, 3, 29])
    assert [entry["i"] for entry in Page(path).data["latents"]] == [3, 29]
    with pytest.raises(ValueError, match=r"latents \[41\].*0 to 40"):
        write_dashboard(path, tiny.hooked, tiny_sae(), tokens, latents=[3, 41])


HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028'\"&amp;\\"]


def test_hostile_text_stays_data(tiny, tokens, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TokenTexts, "text", lambda self, token: HOSTILE[token % 3] + str(token))
    path = write_dashboard(
        tmp_path / "p.html", tiny.hooked, tiny_sae(), tokens, title=HOSTILE[0],
        facts={HOSTILE[1]: HOSTILE[1]},
    )  # fmt: skip
    page = Page(path)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert any(word.startswith(HOSTILE[0]) for word in page.data["words"])
    assert any(word.startswith(HOSTILE[2]) for word in page.data["words"])
    # What the script does with text: it never makes markup of it.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(",
                         page.scripts[1])  # fmt: skip


def test_page_asks_for_nothing(tiny, tokens, tmp_path: Path) -> None:
    page = Page(write_dashboard(tmp_path / "p.html", tiny.hooked, tiny_sae(), tokens))
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href"} & set(attributes)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'")
    urls = re.findall(r"https?://[^\"' ]+", page.scripts[1])
    assert urls == ["http://www.w3.org/2000/svg"]  # a name, which nothing fetches


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_browser_shows_a_latent_and_finds_by_text(tiny, tokens, tmp_path: Path) -> None:
    sae = tiny_sae()
    path = write_dashboard(tmp_path / "p.html", tiny.hooked, sae, tokens, title="<b>bold</b>")
    entry = Page(path).data["latents"][17]
    asked = path.read_text().replace(
        "refresh();\nfollow();\n</script>",
        f'location.hash = "17"; search.value = "w{tokens[0, 3]}"; refresh(); follow();</script>',
    )
    path.write_text(asked)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    dom = done.stdout
    assert "<h2>Latent 17</h2>" in dom
    assert "&lt;b&gt;bold&lt;/b&gt;" in dom and "<b>bold</b>" not in dom
    assert dom.count('class="context"') == len(entry["c"])
    assert dom.count("<rect") == len(entry["h"])
    found = re.search(r'id="count" role="status">(\d+) of 41 latents', dom)
    assert found and 0 < int(found[1]) <= 41


def test_command(tmp_path: Path) -> None:
    model = load_model(EMBEDDED_MODEL)
    sae = tiny_sae("blocks.2.hook_resid_post", d_in=model.cfg.d_model, d_sae=43)
    sae.cfg.metadata.model_name = EMBEDDED_MODEL
    sae.W_enc.data *= 0.02
    sae.save_model(tmp_path / "sae")
    path = tmp_path / "features.html"
    arguments = [
        "dashboard",
        str(tmp_path / "sae"),
        "--output_path",
        str(path),
        "--sequences",
        "11",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    assert len(Page(path).data["latents"]) == 43
