"""Latents, and what steering them must do, by hand."""

from __future__ import annotations

import torch

from jumprelu_plugin.analysis.steering import steer


def latents(sae, x):
    """a = z·H(z − θ), z = (x − b_dec) W_enc + b_enc, from the weights alone."""
    z = (x.flatten(start_dim=2) if x.ndim == 4 else x) - sae.b_dec
    z = z @ sae.W_enc + sae.b_enc
    return z * (z > sae.threshold)


@torch.no_grad()
def edited(model, tokens, hook, edit):
    """Logits with `edit(x [batch, position, d], a [batch, position, d_sae])` in place of x."""

    def replace(x, hook):
        return edit(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    return model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)])


@torch.no_grad()
def steered(model, sae, interventions, tokens):
    with steer(model, sae, interventions):
        return model(tokens)


def frequent_latents(model, sae, tokens, hook):
    """The two latents that fire most, though not everywhere, and one that never fires here."""
    _, cache = model.run_with_cache(tokens, names_filter=hook)
    rates = (latents(sae, cache[hook]) > 0).float().mean(dim=(0, 1))
    first, second = torch.where(rates < 1, rates, 0).argsort(descending=True)[:2].tolist()
    assert rates[second] > 0.2
    return first, second, rates.argsort()[0].item()


def trace(model):
    """Every function attached anywhere in the model."""
    modules = dict(model.named_modules())
    return {
        name: (
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            [id(handle) for handle in getattr(module, "fwd_hooks", [])],
            getattr(module, "name", None),
        )
        for name, module in modules.items()
    }
