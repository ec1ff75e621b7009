"""What a sweep measures of a trained SAE beside its evaluation: histograms, uniformity, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.evaluation.splicing import ScoredText, evaluation_mode, replacement
from jumprelu_plugin.models.hooks import attached, flat_input
from jumprelu_plugin.training.health.machine import taken

# log10 of a latent's density, in tenths.
DENSITY_EDGES = tuple(round(-6 + 0.1 * i, 1) for i in range(61))
_THRESHOLD_BINS = 40


def density_histogram(firing_frequency: Float[Tensor, " d_sae"]) -> list[int]:
    """Number of latents in each interval of `DENSITY_EDGES`; those that never fired are in none."""
    fired = firing_frequency[firing_frequency > 0].double().log10().clamp(DENSITY_EDGES[0], 0.0)
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    # The last interval holds its upper end, a latent that fires on every token.
    place = torch.bucketize(fired, edges, right=True).clamp(1, len(DENSITY_EDGES) - 1) - 1
    return torch.bincount(place, minlength=len(DENSITY_EDGES) - 1).tolist()


def threshold_histogram(sae: Any) -> dict[str, list[float]] | None:
    """`edges` and `counts` of the thresholds in the units of the latents; None without any."""
    threshold = getattr(sae, "threshold", None)
    if not isinstance(threshold, Tensor) or not len(threshold.shape):
        return None
    values = threshold.detach().float().cpu()
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + max(abs(low), 1.0) * 1e-3
    counts = torch.histc(values, _THRESHOLD_BINS, low, high)
    edges = torch.linspace(low, high, _THRESHOLD_BINS + 1)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def uniformity_of_importance(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    *,
    hook: str,
    special_token_ids: Sequence[int],
    batch_size: int = 8,
) -> float | None:
    """How evenly a token's active latents matter: the mean over tokens of exp(S(p))/L0.

    Gemma Scope's "uniformity of active latent importance" (arXiv 2408.05147, C.3, eq. 12 to 14).
    A latent's importance at a token is |y_i|, where

        y = f(x) ⊙ W_decᵀ ∇ₓL,

    ∇ₓL is taken at the model's own activation x, and L is the logit of the correct next token less
    the mean of all logits. p is |y| divided by its sum, S its entropy, and L0 the number of y_i
    that are not 0. exp(S) is the number of latents that would matter as much if all mattered
    equally: the result is 1 where all do and 1/L0 where one alone does. Tokens without an active
    latent, or where none matters, are left out.

    The paper does not say which tokens' logits one L holds. Here it is the sum over the sequence's
    counted predictions, so that one backward pass serves all tokens, and a latent's effect on later
    tokens counts too.

    Returns:
        The mean, or None where no token counts.
    """
    text = ScoredText.of(model, tokens, special_token_ids)
    total, count = 0.0, 0
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with evaluation_mode(model, sae), flat_input(sae):
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for batch in text.batches(batch_size, "importance", progress=False):
                ratios = _uniformity(model, sae, batch, hook)
                total, count = total + float(ratios.sum()), count + len(ratios)
        finally:
            for parameter, required in frozen.items():
                parameter.requires_grad_(required)
    return total / count if count else None


def _uniformity(model: Any, sae: Any, batch: ScoredText, hook: str) -> Float[Tensor, " tokens"]:
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept["x"] = x.detach().requires_grad_()
        return kept["x"]

    with torch.enable_grad(), attached(model, hook, replacement(batch.evaluated, keep)):
        logits = model(batch.tokens, return_type="logits")
        correct = [
            row[:-1][counted].gather(1, ids[1:][counted][:, None]).sum()
            - row[:-1][counted].mean(1).sum()
            for row, ids, counted in zip(logits, batch.tokens, batch.counted, strict=True)
        ]
        (gradient,) = torch.autograd.grad(torch.stack(correct).sum(), kept["x"])
    with torch.no_grad():
        acts = sae.encode(kept["x"])
        acts = acts.to_dense() if acts.layout != torch.strided else acts
    W_dec = sae.W_dec.detach()
    return exp_entropy_per_latent(acts * (gradient.to(W_dec.dtype) @ W_dec.T))


def exp_entropy_per_latent(
    effects: Float[Tensor, "tokens d_sae"],
) -> Float[Tensor, " tokens_with_effects"]:
    """exp(entropy) of the distribution |effects| / Σ|effects|, divided by the number of non-zeros.

    Tokens whose effects are all zero are left out.
    """
    size = effects.detach().double().abs()
    size = size[size.sum(1) > 0]
    share = size / size.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(1)
    return entropy.exp() / (size > 0).sum(1)


class PeakMemory:
    """Peak memory of a block, beside what the process held before it.

    Attributes:
        bytes: after the block; None where the system does not say.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the block."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            self.bytes = torch.cuda.max_memory_allocated(self.device) - before
            return
        known = _reset_peak()
        before = taken(self.device)
        yield
        peak = _peak() if known else None
        self.bytes = None if peak is None else max(0, peak - before)


def _reset_peak() -> bool:
    """Have Linux count the process's peak from now on (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else None
