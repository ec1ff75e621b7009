"""The model is left as it was, whatever else hooks into it."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.analysis.steering import Add, Clamp, steer
from jumprelu_plugin.models.hooks import hook_point
from tests.analysis.steering.edits import steered, trace
from tests.tiny import MLP, WIDTH, tiny_hooked, tiny_sae


@torch.no_grad()
@pytest.mark.parametrize("dress", ["hooked", "bridge"])
@pytest.mark.parametrize("hook", WIDTH)
def test_the_model_is_left_as_it_was(models, tokens, dress, hook):
    model, sae = getattr(models, dress), tiny_sae(hook)
    plan = [Clamp(3, 2.0, positions=[1, 2]), Add(4, 1.0)]
    other = []
    hook_point(model, hook).add_hook(lambda x, hook: other.append(x.shape))
    try:
        clean, before = model(tokens), trace(model)  # a bridge adds hooks at its first forward
        state = {name: sae.__dict__.get(name) for name in ("d_head", "reshape_fn_in")}
        with steer(model, sae, plan):
            assert trace(model) != before
            assert not torch.allclose(model(tokens), clean)
        assert trace(model) == before
        with pytest.raises(KeyError, match="mine"), steer(model, sae, plan):
            model(tokens)
            raise KeyError("mine")
        assert trace(model) == before
        with pytest.raises(ValueError, match="row 5, but the batch has 5"), steer(
            model, sae, Clamp(3, 1.0, batch=5)
        ):  # fmt: skip
            model(tokens)
        assert trace(model) == before
        assert torch.equal(model(tokens), clean)
        assert state == {name: sae.__dict__.get(name) for name in state}
    finally:
        model.reset_hooks()
    assert len(other) == 5


@torch.no_grad()
@pytest.mark.parametrize("dress", ["hooked", "bridge"])
def test_steering_stays_on_through_other_tools(models, tokens, dress):
    """Caching, user hooks, an SAE spliced elsewhere and a reset inside the block."""
    model, sae = getattr(models, dress), tiny_sae()
    expected = steered(model, sae, Add(7, 2.0), tokens)
    with steer(model, sae, Add(7, 2.0)):
        logits, _ = model.run_with_cache(tokens)
        assert torch.equal(logits, expected)
        quiet = [("blocks.0.hook_in" if dress == "bridge" else "hook_embed", lambda x, hook: None)]
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=quiet), expected)
        spliced = model.run_with_saes(tokens, saes=[tiny_sae(MLP)], use_error_term=True)
        torch.testing.assert_close(spliced, expected, rtol=1e-4, atol=1e-4)
        model.reset_hooks()
        assert torch.equal(model(tokens), expected)


def test_steering_that_was_taken_off_is_not_silent(models, tokens):
    sae = tiny_sae()
    hooked = tiny_hooked(models.hf, models.tokenizer)
    with pytest.raises(RuntimeError, match="removed inside the block"), steer(
        hooked, sae, Add(7, 2.0)
    ):  # fmt: skip
        hooked.reset_hooks(including_permanent=True)
    with pytest.raises(RuntimeError, match="an SAE was spliced in there"), steer(
        hooked, sae, Add(7, 2.0)
    ), hooked.saes([sae]):  # fmt: skip
        hooked(tokens)
