"""A model's continuations of a prompt, with and without an intervention on a latent."""

from __future__ import annotations

from typing import Any

import torch

from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp, Intervention, steer

INTERVENTIONS = ("add", "clamp", "ablate")


def intervention(kind: str, latent: int, amount: float) -> Intervention:
    """An intervention on one latent.

    Args:
        kind: one of `INTERVENTIONS`.
        latent: index of the latent.
        amount: the amount to add, or the value to clamp to, in the SAE's activation units; not used
            by `ablate`.

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


def generate(
    model: Any, prompt: str, seed: int, new_tokens: int = 40, prepend_bos: bool | None = None
) -> str:
    """The prompt and a continuation, sampled with this seed (temperature 0.7, top 20).

    Args:
        prepend_bos: whether the BOS token comes before the prompt; None: as the model has it.
    """
    torch.manual_seed(seed)
    return model.generate(
        prompt,
        max_new_tokens=new_tokens,
        temperature=0.7,
        top_k=20,
        prepend_bos=prepend_bos,
        verbose=False,
    )


def generate_steered(
    model: Any,
    sae: Any,
    intervention: Intervention,
    prompt: str,
    *,
    seed: int = 0,
    new_tokens: int = 40,
    prepend_bos: bool | None = None,
) -> tuple[str, str]:
    """`generate`'s text without and with the intervention, sampled with the same seed.

    Raises:
        ValueError: as in `steering.steer`.
    """
    # Steered first: what `steer` refuses, it refuses before any text is generated.
    with steer(model, sae, intervention):
        steered = generate(model, prompt, seed, new_tokens, prepend_bos)
    return generate(model, prompt, seed, new_tokens, prepend_bos), steered
