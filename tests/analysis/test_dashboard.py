"""The page of an SAE's latents: its numbers, its safety, and a browser's view of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jumprelu_plugin.analysis.dashboard import write_dashboard
from jumprelu_plugin.analysis.logit_lens import logit_effects
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.models.token_text import TokenTexts
from tests.analysis.latents import SPECIAL, Page, activations
from tests.tiny import HEADS, RESIDUAL, tiny_sae


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


def test_explanations_are_shown_as_text(tiny, tokens, tmp_path: Path) -> None:
    told = {29: HOSTILE[1], 3: "seas"}
    path = write_dashboard(
        tmp_path / "p.html", tiny.hooked, tiny_sae(), tokens, latents=[3, 5, 29], explanations=told
    )
    page = Page(path)
    assert {entry["i"]: entry.get("e") for entry in page.data["latents"]} == {**told, 5: None}
    assert "img" not in [tag for tag, _ in page.tags]
    assert 'make("p", "explanation", latent.e)' in page.scripts[1]


def test_chosen_latents(tiny, tokens, tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    write_dashboard(path, tiny.hooked, tiny_sae(), tokens, latents=torch.tensor([29, 3, 29]))
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
