"""Steered generation, with and without a cache, against the loop by hand."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.analysis.steering import Add, Clamp, steer
from tests.analysis.steering.edits import edited, frequent_latents, latents
from tests.tiny import RESIDUAL, tiny_sae, tiny_tokens


def continued_by_hand(model, prompt, steps, hook, edit):
    """Greedy decoding, one full pass per token, no cache; `edit` sees absolute positions."""
    tokens = prompt
    for _ in range(steps):
        logits = edited(model, tokens, hook, edit)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("positions", [None, slice(2, None, 3), [1, 6, 9], slice(7, 8)])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dress", ["hooked", "bridge"])
def test_generation_with_and_without_a_cache_is_the_loop_by_hand(models, positions, cache, dress):
    sae, model, prompt = tiny_sae(), getattr(models, dress), tiny_tokens(3, 6, seed=8)
    first, _, _ = frequent_latents(models.hooked, sae, prompt, RESIDUAL)
    plan = [Add(9, 6.0, positions=positions), Clamp(first, 7.0, positions=positions)]

    def edit(x):
        where = torch.zeros(x.shape[1], 1)
        chosen = slice(None) if positions is None else positions
        where[chosen if isinstance(chosen, slice) else [i for i in chosen if i < len(where)]] = 1
        x_new = x + where * 6.0 * sae.W_dec[9]
        return x_new + where * (7.0 - latents(sae, x)[..., first : first + 1]) * sae.W_dec[first]

    options = {"max_new_tokens": 9, "do_sample": False, "stop_at_eos": False, "verbose": False,
               "use_past_kv_cache": cache, "return_type": "tokens"}  # fmt: skip
    with torch.no_grad():
        clean = model.generate(prompt, **options)
        expected = continued_by_hand(models.hooked, prompt, 9, RESIDUAL, edit)
        with steer(model, sae, plan):
            found = model.generate(prompt, **options)
        assert torch.equal(model.generate(prompt, **options), clean)
    assert found.shape == (3, 15)
    assert torch.equal(found, expected)
    assert not torch.equal(found, clean)


@torch.no_grad()
def test_last_touches_each_generated_position_once_with_a_cache(models):
    sae, prompt = tiny_sae(), tiny_tokens(3, 6, seed=8)
    options = {"max_new_tokens": 7, "do_sample": False, "stop_at_eos": False, "verbose": False}
    from_the_end_of_the_prompt = slice(5, None)
    for model in (models.hooked, models.bridge):
        with steer(model, sae, Add(9, 12.0, positions="last")):
            found = model.generate(prompt, **options)
        with steer(model, sae, Add(9, 12.0, positions=from_the_end_of_the_prompt)):
            assert torch.equal(model.generate(prompt, **options), found)


@torch.no_grad()
def test_generate_in_transformers_through_a_bridge(models):
    """A bridge's components stay in the transformers model, and so does the steering."""
    sae, prompt = tiny_sae(), tiny_tokens(3, 6, seed=8)
    with steer(models.bridge, sae, Add(9, 12.0, positions=slice(3, None, 2))):
        expected = models.bridge.generate(
            prompt, max_new_tokens=7, do_sample=False, stop_at_eos=False, verbose=False
        )
        found = models.bridge.original_model.generate(
            prompt, max_new_tokens=7, do_sample=False, eos_token_id=-1,
            attention_mask=torch.ones_like(prompt),
        )  # fmt: skip
    assert torch.equal(found, expected)
