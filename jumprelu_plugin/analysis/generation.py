"""Text that a model continues a prompt with, without and with an intervention on a latent."""

from __future__ import annotations

from typing import Any

import torch

from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp, Intervention, steer

INTERVENTIONS = ("add", "clamp", "ablate")


def intervention(kind: str, latent: int, amount: float) -> Intervention:
    """The intervention of that kind on one latent.

    Args:
        kind: one of `INTERVENTIONS`.
        amount: added, or clamped to, in the SAE's activation units; `ablate` has none.

    Raises:
        ValueError: there is no such kind, or the amount is not finite.
    """
    if kind == "add":
        return Add(latent, amount)
    if kind == "clamp":
        return Clamp(latent, amount)
    if kind == "ablate":
        return Ablate(latent)
    raise ValueError(f"there is no intervention {kind!r}; there are: {', '.join(INTERVENTIONS)}")


def generate(model: Any, prompt: str, seed: int, new_tokens: int = 40) -> str:
    """Prompt and sampled continuation (temperature 0.7, top 20); repeatable for a seed."""
    torch.manual_seed(seed)
    return model.generate(
        prompt, max_new_tokens=new_tokens, temperature=0.7, top_k=20, verbose=False
    )


def generate_steered(
    model: Any,
    sae: Any,
    intervention: Intervention,
    prompt: str,
    *,
    seed: int = 0,
    new_tokens: int = 40,
) -> tuple[str, str]:
    """`generate`'s text without and with the intervention, from the same seed.

    Raises as `steering.steer` does.
    """
    without = generate(model, prompt, seed, new_tokens)
    with steer(model, sae, intervention):
        return without, generate(model, prompt, seed, new_tokens)
