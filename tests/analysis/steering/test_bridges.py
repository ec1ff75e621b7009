"""Steering a model through TransformerLens' bridge."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp, steer
from jumprelu_plugin.models.hooks import attached, hook_point
from tests.analysis.steering.edits import frequent_latents, steered
from tests.tiny import HEADS, MLP, RESIDUAL, WIDTH, tiny_bridge, tiny_hf, tiny_sae

CANONICAL = {
    RESIDUAL: "blocks.1.hook_out",
    HEADS: "blocks.1.attn.o.hook_in",
    MLP: "blocks.1.ln2_post.hook_out",
}
BRIDGES = ["compatible", "plain", "compatible after a splice", "plain after a splice"]


@pytest.fixture(params=BRIDGES)
def bridge(request, models):
    """A bridge with and without compatibility mode, fresh and after SAEs came and went."""
    compatibility = request.param.startswith("compatible")
    model = tiny_bridge(tiny_hf(), models.tokenizer, compatibility=compatibility)
    if request.param.endswith("splice"):
        for hook in WIDTH:
            with model.saes([tiny_sae(hook)]):
                pass
    return model


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_a_bridge_is_steered_exactly_once(models, tokens, bridge, hook):
    """Not zero times (an alias without compatibility mode), not twice (a name left by a splice)."""
    sae = tiny_sae(hook)
    first, _, _ = frequent_latents(models.hooked, sae, tokens, hook)
    clean = bridge(tokens)
    for intervention in (Add(7, 2.0), Clamp(first, 1.5), Ablate(first)):
        expected = steered(models.hooked, sae, intervention, tokens)
        calls = []
        with (
            attached(bridge, hook, lambda x, calls=calls: calls.append(x.shape)),
            steer(bridge, sae, intervention),
        ):
            found = bridge(tokens)
        assert len(calls) == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - clean).abs().max() > 0.02
    assert torch.equal(bridge(tokens), clean)


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_a_bridge_may_be_named_by_its_own_hooks(models, tokens, bridge, hook):
    alias, canonical = tiny_sae(hook), tiny_sae(hook)
    canonical.cfg.metadata.hook_name = CANONICAL[hook]
    assert hook_point(bridge, hook) is hook_point(bridge, CANONICAL[hook])
    with_alias = steered(bridge, alias, Clamp(7, 2.0), tokens)
    assert torch.equal(steered(bridge, canonical, Clamp(7, 2.0), tokens), with_alias)


@torch.no_grad()
def test_steering_a_bridge_is_splicing_with_the_error_term(models, tokens, bridge):
    """Latent hooks exist on a bridge under the canonical name only."""
    sae = tiny_sae()
    first, second, _ = frequent_latents(models.hooked, sae, tokens, RESIDUAL)

    def set_latents(acts, hook):
        acts[..., first] = 3.0
        acts[..., second] = 0.0
        return acts

    with bridge.saes([sae], use_error_term=True):
        name = bridge.get_sae_hook_name(sae)
        expected = bridge.run_with_hooks(tokens, fwd_hooks=[(name, set_latents)])
    found = steered(bridge, sae, [Clamp(first, 3.0), Ablate(second)], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - bridge(tokens)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("hook", WIDTH)
def test_after_steering_the_bridge_own_hooks_fire_once(tokens, bridge, hook):
    """A splice and reset leaves wrong names; the first look-up puts them right for everyone."""
    steered(bridge, tiny_sae(hook), Add(7, 2.0), tokens)
    names = [CANONICAL[hook]]
    if bridge.compatibility_mode:  # without it a bridge takes no aliases here, by its own rules
        names.append(hook)
    for name in names:
        calls = []

        def count(x, hook, calls=calls):
            calls.append(x.shape)

        with bridge.hooks(fwd_hooks=[(name, count)]):
            bridge(tokens)
        assert len(calls) == 1, name
        bridge.add_hook(name, count)
        bridge(tokens)
        bridge.reset_hooks()
        assert len(calls) == 2, name
        _, cache = bridge.run_with_cache(tokens, names_filter=[name])
        assert name in cache.cache_dict, name


@torch.no_grad()
@pytest.mark.parametrize("compatibility", [True, False])
def test_a_healthy_bridge_keeps_its_names_and_its_cache_keys(models, tokens, compatibility):
    bridge = tiny_bridge(tiny_hf(), models.tokenizer, compatibility=compatibility)
    names = {name: point.name for name, point in bridge.hook_dict.items()}
    keys = bridge.run_with_cache(tokens)[1].cache_dict.keys()
    for hook in WIDTH:
        steered(bridge, tiny_sae(hook), Add(7, 2.0), tokens)
    assert {name: point.name for name, point in bridge.hook_dict.items()} == names
    assert bridge.run_with_cache(tokens)[1].cache_dict.keys() == keys
