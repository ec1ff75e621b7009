"""Delta LM loss: what the model loses when the reconstruction stands in for the activation.

Which tokens count. A position is *evaluated* when its token is not special (BOS, EOS, PAD, ...).
At evaluated positions the activation at `hook_out` is replaced; at special ones it stays as the
model made it, and they are in no metric. The prediction made at position t counts when t and t + 1
are both evaluated: from a special position nothing was replaced, and a special target (padding,
the start of the next document) is not language.

No attention mask is passed: pad on the right, or pack, so that causality hides what is not text.

It does not sum activation metrics (metrics.py) and does not present anything (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input, require_folded

# Latents are dense on this many tokens at once: 2 GB in float32 at a width of 131,072.
_TOKENS_PER_ENCODE = 4096

Observe = Callable[
    [Float[Tensor, "tokens d_out"], Float[Tensor, "tokens d_out"], Float[Tensor, "tokens d_sae"]],
    None,
]


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


def evaluated_positions(
    tokens: Int[Tensor, "sequences positions"], special_token_ids: Sequence[int]
) -> Bool[Tensor, "sequences positions"]:
    """True where the token is not special."""
    special = torch.tensor(sorted(special_token_ids), dtype=tokens.dtype, device=tokens.device)
    return ~torch.isin(tokens, special)


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
    for a transcoder). `observe(target, reconstruction, acts)` is called with the evaluated tokens
    of each batch, for metrics. Four forward passes per batch; the model and the SAE are left as
    they were found.

    Raises ValueError for tokens that are not a two-dimensional integer tensor of known ids, for
    too few of them, for unknown hooks, for widths that do not match, and for activations,
    reconstructions or losses that are not finite; RuntimeError when a hook does not fire exactly
    once.
    """
    hook_out = hook_out or hook_in
    require_folded(sae)
    tokens = _checked(model, tokens, batch_size).to(model.cfg.device)
    evaluated = evaluated_positions(tokens, special_token_ids)
    counted = evaluated[:, :-1] & evaluated[:, 1:]
    n_tokens, n_predictions = int(evaluated.sum()), int(counted.sum())
    if n_tokens < 2 or n_predictions < 1:
        raise ValueError(
            f"Of {tokens.numel()} tokens {n_tokens} are not special and {n_predictions} predictions"
            f" count; at least 2 and 1 are needed. Special ids: {sorted(special_token_ids)}."
        )

    batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    clean = spliced = zero_ablated = mean_ablated = 0.0
    total: Tensor | None = None
    with _evaluation_mode(model, sae):
        for rows in tqdm(batches, desc="spliced", disable=not progress):
            here, text, scored = evaluated[rows], tokens[rows], counted[rows]
            logits, read, target = _clean_pass(model, text, hook_in, hook_out)
            clean += _loss(logits, text, scored)
            x, y = _finite(read, here, hook_in), _finite(target, here, hook_out)
            reconstruction = _reconstruct(sae, x, y, hook_in, hook_out, observe)
            spliced += _loss(_replaced_pass(model, text, hook_out, here, reconstruction),
                             text, scored)  # fmt: skip
            zero_ablated += _loss(_replaced_pass(model, text, hook_out, here, torch.zeros_like(y)),
                                  text, scored)  # fmt: skip
            part = y.double().sum(dim=0)
            total = part if total is None else total + part
        assert total is not None
        mean = total / n_tokens
        for rows in tqdm(batches, desc="mean-ablated", disable=not progress):
            logits = _replaced_pass(model, tokens[rows], hook_out, evaluated[rows], mean)
            mean_ablated += _loss(logits, tokens[rows], counted[rows])
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


def _loss(
    logits: Float[Tensor, "rows positions vocabulary"],
    tokens: Int[Tensor, "rows positions"],
    counted: Bool[Tensor, "rows positions-1"],
) -> float:
    """Summed cross-entropy of the counted predictions, in nats."""
    total = 0.0
    # Row by row: float32 logits of a whole batch would not fit beside a vocabulary of 256,000.
    for row_logits, row_tokens, row_counted in zip(logits, tokens, counted, strict=True):
        chosen = row_logits[:-1][row_counted].float()
        losses = F.cross_entropy(chosen, row_tokens[1:][row_counted], reduction="none")
        total += losses.double().sum().item()
    return total


def _clean_pass(
    model: Any, tokens: Int[Tensor, "rows positions"], hook_in: str, hook_out: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the flattened activations at both hooks."""
    hooks = dict.fromkeys((hook_in, hook_out))
    seen: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(attached(model, hook, seen[hook].append))
        logits = model(tokens, return_type="logits")
    for hook, activations in seen.items():
        if len(activations) != 1:
            raise RuntimeError(
                f"The hook {hook!r} fired {len(activations)} times in one forward pass of"
                f" {type(model).__name__}; an evaluation needs a hook that fires once."
            )
    return logits, flat_heads(seen[hook_in][0]), flat_heads(seen[hook_out][0])


def _replaced_pass(
    model: Any,
    tokens: Int[Tensor, "rows positions"],
    hook: str,
    where: Bool[Tensor, "rows positions"],
    values: Float[Tensor, "tokens d"] | Float[Tensor, " d"],
) -> Float[Tensor, "rows positions vocabulary"]:
    """Logits with the activation at `hook` replaced by `values` at the positions `where`."""

    def replace(activation: Tensor) -> Tensor:
        changed = flat_heads(activation).clone()
        changed[where.to(changed.device)] = values.to(changed)
        return changed.reshape(activation.shape)

    with attached(model, hook, replace):
        return model(tokens, return_type="logits")


def _reconstruct(
    sae: Any, x: Tensor, target: Tensor, hook_in: str, hook_out: str, observe: Observe | None
) -> Float[Tensor, "tokens d_out"]:
    if x.shape[-1] != sae.cfg.d_in:
        raise ValueError(
            f"The SAE has d_in {sae.cfg.d_in} and the activation at {hook_in!r} has width"
            f" {x.shape[-1]}. Give the hook the SAE was trained on, or the right model."
        )
    parts = []
    with flat_input(sae):
        for piece, wanted in zip(
            x.split(_TOKENS_PER_ENCODE), target.split(_TOKENS_PER_ENCODE), strict=True
        ):
            piece = piece.to(sae.W_dec.device)
            acts = sae.encode(piece)
            # A skip transcoder adds W_skip·x in forward only, not in decode.
            made = sae.forward(piece) if hasattr(sae, "W_skip") else sae.decode(acts)
            made = made.to(target.device)
            if made.shape != wanted.shape:
                raise ValueError(
                    f"The SAE's output has width {made.shape[-1]} and the activation at"
                    f" {hook_out!r} has width {wanted.shape[-1]}. Give the hook the SAE writes to."
                )
            if not made.isfinite().all():
                raise ValueError(
                    f"The SAE's reconstruction of {hook_out!r} holds NaN or an infinity, from"
                    " finite activations. Check the SAE's weights."
                )
            if observe is not None:
                observe(wanted, made, acts)
            parts.append(made)
    return torch.cat(parts)


def _finite(activation: Tensor, where: Bool[Tensor, "rows positions"], hook: str) -> Tensor:
    """The activation at the evaluated positions, [tokens, d]."""
    chosen = activation[where.to(activation.device)]
    bad = int((~chosen.isfinite()).any(dim=-1).sum())
    if bad:
        raise ValueError(
            f"The activation at {hook!r} holds NaN or an infinity on {bad} of {len(chosen)} tokens"
            " of one batch. Check the model's weights and its dtype (float16 overflows)."
        )
    return chosen


def _checked(model: Any, tokens: Tensor, batch_size: int) -> Tensor:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"tokens must be integers [sequences, positions]; got {tokens.dtype}"
            f" {tuple(tokens.shape)}."
        )
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"No prediction can be scored on tokens of shape {tuple(tokens.shape)}.")
    vocabulary = model.cfg.d_vocab
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"Token ids run from {int(tokens.min())} to {int(tokens.max())}; the model knows 0 to"
            f" {vocabulary - 1}. Was the text tokenized for another model?"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    return tokens.long()


@contextmanager
def _evaluation_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Dropout and the like off during the block; each submodule's mode comes back as it was."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, training in modes.items():
            part.training = training
