"""The tools of evaluations that splice into a model: which tokens count, and hooks.

Which tokens count. A position is *evaluated* when its token is not special (BOS, EOS, PAD, ...).
Nor is a position outside the slice that the dictionary was trained on (`seqpos_slice`) evaluated.
At evaluated positions an output is replaced; at others it stays as the model made it, and they are
in no metric. The prediction made at position t counts when t and t + 1 are both evaluated:
from a special position nothing was replaced, and a special target (padding, the start of the next
document) is not language.

No attention mask is passed: pad on the right, or pack, so that causality hides what is not text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input, with_heads
from jumprelu_plugin.models.trained_on import excluded_tokens
from jumprelu_plugin.step import spinning

# Latents are dense on this many tokens at once: 2 GB in float32 at a width of 131,072.
_TOKENS_PER_ENCODE = 4096

Observe = Callable[
    [Float[Tensor, "tokens d_out"], Float[Tensor, "tokens d_out"], Float[Tensor, "tokens d_sae"]],
    None,
]


@dataclass(frozen=True, eq=False)
class ScoredText:
    """Tokens, and which of them count.

    Attributes:
        tokens: [sequences, positions].
        evaluated: where a token is not special, inside the slice of positions.
        counted: predictions, [sequences, positions - 1]: both tokens are evaluated.
    """

    tokens: Int[Tensor, "sequences positions"]
    evaluated: Bool[Tensor, "sequences positions"]
    counted: Bool[Tensor, "sequences positions-1"]

    @classmethod
    def of(
        cls,
        model: Any,
        tokens: Tensor,
        special_token_ids: Sequence[int],
        positions: Iterable[slice] = (),
    ) -> ScoredText:
        """The text on the model's device, evaluated inside all of the slices of positions.

        Raises ValueError for tokens that are not a two-dimensional integer tensor of ids the model
        knows, and where no prediction counts.
        """
        positions = list(positions)
        tokens = _checked(model, tokens).to(model.cfg.device)
        evaluated = evaluated_positions(tokens, special_token_ids, positions)
        text = cls(tokens, evaluated, evaluated[:, :-1] & evaluated[:, 1:])
        n_tokens, n_predictions = int(text.evaluated.sum()), text.n_predictions
        if n_predictions < 1:
            raise ValueError(
                f"Of {tokens.numel()} tokens {n_tokens} are evaluated and {n_predictions}"
                " predictions count; at least 2 and 1 are needed. A prediction counts where a token"
                " and the one after it are not special and inside the positions that the dictionary"
                f" was trained on. Special ids: {sorted(special_token_ids)}; positions:"
                f" {[(part.start, part.stop, part.step) for part in positions]}."
            )
        return text

    @property
    def n_predictions(self) -> int:
        return int(self.counted.sum())

    def batches(self, size: int, description: str, progress: bool) -> Iterator[ScoredText]:
        """The text, `size` sequences at a time.

        Raises ValueError for a size below 1.
        """
        if size < 1:
            raise ValueError(f"batch_size must be at least 1; got {size}.")
        for start in tqdm(range(0, len(self.tokens), size), desc=description, disable=not progress):
            spinning.adapt()
            rows = slice(start, start + size)
            yield ScoredText(self.tokens[rows], self.evaluated[rows], self.counted[rows])

    def loss(self, logits: Float[Tensor, "sequences positions vocabulary"]) -> float:
        """Summed cross-entropy of the counted predictions, in nats."""
        total = 0.0
        # Row by row: float32 logits of a batch would not fit beside a vocabulary of 256,000.
        for row_logits, tokens, counted in zip(logits, self.tokens, self.counted, strict=True):
            chosen = row_logits[:-1][counted].float()
            losses = F.cross_entropy(chosen, tokens[1:][counted], reduction="none")
            total += losses.double().sum().item()
        return total


def evaluated_positions(
    tokens: Int[Tensor, "sequences positions"],
    special_token_ids: Sequence[int],
    positions: Iterable[slice] = (),
) -> Bool[Tensor, "sequences positions"]:
    """True where the token is not special and its position is inside all of the slices."""
    special = torch.tensor(sorted(special_token_ids), dtype=tokens.dtype, device=tokens.device)
    evaluated = ~torch.isin(tokens, special)
    for part in positions:
        inside = torch.zeros_like(evaluated)
        inside[:, part] = True
        evaluated &= inside
    return evaluated


def special_token_ids_of(
    model: Any, given: Iterable[int] | None, dictionaries: Iterable[Any] = ()
) -> list[int]:
    """The given ids, else those of the model's tokenizer (BOS, EOS, PAD, SEP, decoder-start).

    To the tokenizer's come the ids that a dictionary's metadata lists in `exclude_special_tokens`:
    it was not trained on them. Sorted.

    Raises ValueError for a model without a tokenizer when none are given.
    """
    if given is not None:
        return sorted(set(given))
    if model.tokenizer is None:
        raise ValueError(
            "The model has no tokenizer, so its special tokens are unknown. Pass"
            " special_token_ids, or () to count every token."
        )
    found = set(get_special_token_ids(model.tokenizer))
    for dictionary in dictionaries:
        found |= excluded_tokens(dictionary)
    return sorted(found)


@contextmanager
def evaluation_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Dropout and the like off during the block; each submodule's mode comes back as it was."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def read_activations(
    model: Any,
    tokens: Int[Tensor, "rows positions"],
    hooks: Iterable[str],
    heads: Mapping[str, int | None] | None = None,
) -> tuple[Float[Tensor, "rows positions vocabulary"], dict[str, Float[Tensor, "rows pos d"]]]:
    """Logits of the unchanged model, and the activations at each hook, heads flattened.

    Where `heads` has a hook's head, that head's alone.

    Raises RuntimeError when a hook does not fire exactly once.
    """
    seen: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    with ExitStack() as stack:
        for hook, activations in seen.items():
            stack.enter_context(attached(model, hook, activations.append))
        logits = model(tokens, return_type="logits")
    for hook, activations in seen.items():
        if len(activations) != 1:
            raise RuntimeError(
                f"The hook {hook!r} fired {len(activations)} times in one forward pass of"
                f" {type(model).__name__}; an evaluation needs a hook that fires once."
            )
    heads = heads or {}
    return logits, {hook: flat_heads(x[0], heads.get(hook)) for hook, x in seen.items()}


def finite_activations(
    activation: Float[Tensor, "rows positions d"], where: Bool[Tensor, "rows positions"], hook: str
) -> Float[Tensor, "tokens d"]:
    """The activation at the evaluated positions.

    Raises ValueError, with the hook's name, where it holds NaN or an infinity.
    """
    chosen = activation[where.to(activation.device)]
    bad = int((~chosen.isfinite()).any(dim=-1).sum())
    if bad:
        raise ValueError(
            f"The activation at {hook!r} holds NaN or an infinity on {bad} of {len(chosen)} tokens"
            " of one batch. Check the model's weights and its dtype (float16 overflows)."
        )
    return chosen


def replacement(
    where: Bool[Tensor, "rows positions"],
    values: Tensor | Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens d"]],
    head: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function for a hook: the activation with `values` at the positions `where`.

    Args:
        values: [tokens, d] or [d], or a function that gives them from what stood there.
        head: the only head that changes; None for all.
    """

    def replace(activation: Tensor) -> Tensor:
        changed = flat_heads(activation, head).clone()
        here = where.to(changed.device)
        new = values(changed[here]) if callable(values) else values
        changed[here] = new.to(changed)
        return with_heads(activation, changed, head)

    return replace


def reconstruct(
    sae: Any,
    x: Float[Tensor, "tokens d_in"],
    target: Float[Tensor, "tokens d_out"],
    hook_in: str,
    hook_out: str,
    observe: Observe | None,
) -> Float[Tensor, "tokens d_out"]:
    """What an SAE or a transcoder makes of x, some thousand tokens at a time.

    Args:
        hook_in, hook_out: the hooks' names, for errors.
        observe: called with each piece's target, output and latents.

    Raises ValueError for widths that do not match, and outputs that are not finite.
    """
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


def _checked(model: Any, tokens: Tensor) -> Tensor:
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
    return tokens.long()
