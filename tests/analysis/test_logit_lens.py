"""Effects of a latent on the logits."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from jumprelu_plugin.analysis.logit_lens import all_logit_effects, logit_effects
from tests.tiny import HEADS, MLP, tiny_sae


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
    # In most models the heads together are as wide as the stream.
    as_wide = tiny_sae(HEADS, d_in=33)
    with pytest.raises(ValueError, match="33 values at blocks.1.attn.hook_z, .* stream has 33"):
        logit_effects(tiny.hooked, as_wide, 5)


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
