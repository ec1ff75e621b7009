"""Windows for studies: what they hold, by the plain route, and how they are chosen."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.analysis.top_activations import collect_top_activations
from jumprelu_plugin.analysis.windows import WindowCounts, WindowKind, collect_windows
from tests.analysis.latents import SPECIAL, activations
from tests.tiny import tiny_sae, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = WindowCounts(top=2, sampled=3, silent=2, before=3, after=1)


def test_windows_hold_the_activations_of_their_text(tiny) -> None:
    tokens = tiny_tokens(sequences=31, positions=29)
    sae = tiny_sae(seed=5)
    with torch.no_grad():
        sae.threshold += 1.1
        sae.threshold[7] = 1e6  # never fires
    latents = [3, 7, 11, 2, 40]
    top = collect_top_activations(tiny.hooked, sae, tokens, special_token_ids=SPECIAL)
    found = collect_windows(
        tiny.hooked, sae, top, latents, COUNTS, batch_size=5, special_token_ids=SPECIAL, seed=3
    )
    acts, flat = activations(tiny, sae, tokens), tokens.flatten()
    for row, latent in enumerate(latents):
        own = acts[..., latent]
        shown: list[set[int]] = []
        for column, kind in enumerate(found.kind[row].tolist()):
            inside = found.inside[row, column]
            if kind == WindowKind.NONE:
                assert not inside.any()
                continue
            focus = int(found.position[row, column])
            places = torch.arange(focus - 3, focus + 2)[inside]
            assert len({p // 29 for p in places.tolist()}) == 1
            assert (found.tokens[row, column][inside] == flat[places]).all()
            expected = own.flatten()[places]
            torch.testing.assert_close(found.activation[row, column][inside], expected)
            if kind == WindowKind.SILENT:
                assert (expected == 0).all()
            else:
                assert own.flatten()[focus] > 0
                assert not any(set(places.tolist()) & earlier for earlier in shown)
                shown.append(set(places.tolist()))
        kinds = found.kind[row].tolist()
        if latent == 7:
            assert kinds == [0] * 5 + [WindowKind.SILENT] * 2
        else:
            assert found.position[row, 0] == own.flatten().argmax()
            assert kinds[:2] == [WindowKind.TOP] * 2


def test_sampled_windows_are_a_fair_sample(tiny) -> None:
    """Their median activation is near the median of all firings, far below the top ones."""
    tokens = tiny_tokens(sequences=61, positions=31)
    sae = tiny_sae(seed=5)
    top = collect_top_activations(tiny.hooked, sae, tokens, special_token_ids=SPECIAL)
    counts = WindowCounts(top=0, sampled=9, before=0, after=0)
    windows = collect_windows(
        tiny.hooked, sae, top, range(41), counts, special_token_ids=SPECIAL, seed=11
    )
    acts = activations(tiny, sae, tokens).flatten(0, 1)
    below = [
        float((acts[:, i][acts[:, i] > 0] < windows.activation[i, 4, 0]).float().mean())
        for i in range(41)
        if (acts[:, i] > 0).sum() > 60
    ]
    assert len(below) > 20
    # The mean over latents of the rank of a sample's median is 1/2; its error here is about 0.02.
    assert abs(sum(below) / len(below) - 0.5) < 0.07


def test_tokens_that_the_sae_was_not_trained_on_count_as_silent(tiny) -> None:
    tokens = tiny_tokens(sequences=31, positions=29)
    sae = tiny_sae(seed=5)
    left_out = tokens.flatten().bincount().topk(5).indices
    sae.cfg.metadata.exclude_special_tokens = left_out.tolist()
    top = collect_top_activations(tiny.hooked, sae, tokens, special_token_ids=SPECIAL)
    found = collect_windows(
        tiny.hooked, sae, top, range(41), COUNTS, special_token_ids=SPECIAL, seed=3
    )
    unseen = torch.isin(found.tokens, left_out) & found.inside
    assert unseen.sum() > 100 and (found.activation[unseen] == 0).all()
    firing = (found.kind == WindowKind.TOP) | (found.kind == WindowKind.SAMPLED)
    assert not torch.isin(tokens.flatten()[found.position[firing]], left_out).any()
