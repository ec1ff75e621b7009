"""Delta LM loss: what the model loses when the reconstruction stands in for the activation.

Which tokens count is in splicing.py. It does not sum activation metrics (metrics.py) and does not
present anything (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.evaluation.splicing import (
    Observe,
    ScoredText,
    evaluation_mode,
    finite_activations,
    read_activations,
    reconstruct,
    replacement,
)
from jumprelu_plugin.models.firing import require_firing
from jumprelu_plugin.models.hooks import attached, require_folded
from jumprelu_plugin.models.trained_on import sae_heads, trained_positions


@dataclass(frozen=True)
class LanguageModelLoss:
    """Mean cross-entropy per counted prediction, in nats, with the activation at `hook_out`

    clean           left as it is,
    spliced         replaced by the reconstruction,
    mean_ablated    replaced by its mean over the evaluated tokens,
    zero_ablated    replaced by zero,

    always at evaluated positions only.
    """

    clean: float
    spliced: float
    mean_ablated: float
    zero_ablated: float
    n_predictions: int

    @property
    def delta(self) -> float:
        """`spliced - clean`, in nats: the delta LM loss."""
        return self.spliced - self.clean

    @property
    def fraction_recovered(self) -> float | None:
        """`(mean_ablated - spliced) / (mean_ablated - clean)`.

        None when mean ablation does not raise the loss: there is then nothing to recover.
        """
        damage = self.mean_ablated - self.clean
        return (self.mean_ablated - self.spliced) / damage if damage > 0 else None


@torch.no_grad()
def delta_lm_loss(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    *,
    hook_in: str,
    hook_out: str | None = None,
    special_token_ids: Sequence[int] = (),
    batch_size: int = 8,
    observe: Observe | None = None,
    progress: bool = False,
) -> LanguageModelLoss:
    """Losses of `model` on `tokens` as it is, with `sae` spliced in, and with ablations.

    The SAE reads `hook_in` and its output replaces `hook_out` (default: the same hook; another one
    for a transcoder), at the head and the positions of its metadata. `observe(target,
    reconstruction, acts)` is called with the evaluated tokens of each batch, for metrics. Four
    forward passes per batch; the model and the SAE are left as they were found.

    Raises ValueError for tokens that are not a two-dimensional integer tensor of known ids, for
    too few of them, for hooks that do not exist or do not fire, for widths that do not match, and
    for activations, reconstructions or losses that are not finite; RuntimeError when a hook fires
    more than once.
    """
    hook_out = hook_out or hook_in
    require_folded(sae)
    require_firing(model, hook_in, hook_out)
    head_in, head_out = sae_heads(sae)
    heads = {hook_out: head_out, hook_in: head_in}
    text = ScoredText.of(model, tokens, special_token_ids, [trained_positions(sae)])
    clean = spliced = zero_ablated = mean_ablated = 0.0
    total: Tensor | None = None
    with evaluation_mode(model, sae):
        for batch in text.batches(batch_size, "spliced", progress):
            logits, seen = read_activations(model, batch.tokens, (hook_in, hook_out), heads)
            clean += batch.loss(logits)
            x, y = (
                finite_activations(seen[hook], batch.evaluated, hook)
                for hook in (hook_in, hook_out)
            )
            made = reconstruct(sae, x, y, hook_in, hook_out, observe)
            spliced += batch.loss(_replaced_pass(model, batch, hook_out, made, head_out))
            zeros = torch.zeros_like(y)
            zero_ablated += batch.loss(_replaced_pass(model, batch, hook_out, zeros, head_out))
            part = y.double().sum(dim=0)
            total = part if total is None else total + part
        assert total is not None
        mean = total / int(text.evaluated.sum())
        for batch in text.batches(batch_size, "mean-ablated", progress):
            mean_ablated += batch.loss(_replaced_pass(model, batch, hook_out, mean, head_out))
    n_predictions = text.n_predictions
    losses = LanguageModelLoss(
        clean=clean / n_predictions,
        spliced=spliced / n_predictions,
        mean_ablated=mean_ablated / n_predictions,
        zero_ablated=zero_ablated / n_predictions,
        n_predictions=n_predictions,
    )
    if not math.isfinite(clean + spliced + mean_ablated + zero_ablated):
        raise ValueError(
            f"Activations at {hook_out!r} are finite and the model's loss is not: {losses}. Check"
            " the weights above that hook and the model's dtype."
        )
    return losses


def _replaced_pass(
    model: Any, batch: ScoredText, hook: str, values: Tensor, head: int | None
) -> Float[Tensor, "rows positions vocabulary"]:
    """Logits with `values` in place of the activation at the evaluated positions."""
    with attached(model, hook, replacement(batch.evaluated, values, head)):
        return model(batch.tokens, return_type="logits")
