"""What a whole set of transcoders does to a model when all of them stand in at once.

Each reads its input hook in the model as the others have changed it, as in a replacement model of
a circuit tool. The fidelity of each is measured on the unchanged model, so that a layer is judged
by its own error and not by those below it. Which tokens count is as in `loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from jumprelu_plugin.evaluation.loss import (
    _checked,
    _evaluation_mode,
    _finite,
    _loss,
    _reconstruct,
    evaluated_positions,
)
from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.evaluation.report import _special_token_ids
from jumprelu_plugin.models.hooks import attached, flat_heads, require_folded, sae_sites
from jumprelu_plugin.records import write_json


@dataclass(frozen=True)
class LayerFidelity:
    """One transcoder on the unchanged model; the quantities are those of `Metrics`."""

    hook_in: str
    hook_out: str
    d_sae: int
    fvu: float
    l0: float
    dead_share: float


@dataclass(frozen=True)
class SplicedSet:
    """Mean cross-entropy per counted prediction, in nats, with every output hook

    clean           left as it is,
    spliced         replaced by its transcoder's output,
    mean_ablated    replaced by its mean on the unchanged model.
    """

    n_predictions: int
    loss_clean: float
    loss_spliced: float
    loss_mean_ablated: float
    layers: tuple[LayerFidelity, ...]

    @property
    def delta_loss(self) -> float:
        """`loss_spliced - loss_clean`, in nats."""
        return self.loss_spliced - self.loss_clean

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "delta_loss": self.delta_loss}

    def save(self, path: str | Path, provenance: dict[str, Any]) -> Path:
        """Write `{"kind": "spliced_set", "result": ..., "provenance": ...}` as a JSON record."""
        record = {"kind": "spliced_set", "result": self.to_dict(), "provenance": provenance}
        return write_json(path, record)

    def table(self) -> Table:
        """A rich table: print it with `rich.print` or a `Console`."""
        table = Table(
            title=f"{len(self.layers)} transcoders, spliced in at once",
            caption=(
                f"LM loss {self.loss_clean:.4f} clean, {self.loss_spliced:.4f} spliced "
                f"(delta {self.delta_loss:.4f}), {self.loss_mean_ablated:.4f} mean-ablated; nats, "
                f"{self.n_predictions:,} predictions"
            ),
        )
        table.add_column("output hook")
        for name in ("FVU", "L0", "dead"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.hook_out, f"{layer.fvu:.4f}", f"{layer.l0:.1f}", f"{layer.dead_share:.1%}"
            )
        return table


@torch.no_grad()
def evaluate_transcoders(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "sequences positions"],
    *,
    batch_size: int = 8,
    special_token_ids: Iterable[int] | None = None,
    progress: bool = False,
) -> SplicedSet:
    """Losses of `model` with all transcoders in place, and each one's fidelity by itself.

    The transcoders are SAELens' inference objects with their hooks in their metadata. W_skip is
    applied (SAELens' own wrapper, which calls encode and decode, would lose it). Three forward
    passes a batch; the model is left as it was found.

    Raises ValueError for an empty set, two transcoders at one output hook, one whose scale is not
    folded, hooks or widths that do not fit, and tokens that `delta_lm_loss` refuses.
    """
    sites = [sae_sites(transcoder) for transcoder in transcoders]
    _refuse_set(transcoders, sites)
    return spliced_set(
        model,
        transcoders,
        tokens,
        sites,
        [transcoder.cfg.d_sae for transcoder in transcoders],
        lambda text, here, metrics: _observed(model, text, here, transcoders, sites, metrics),
        lambda text, here: _spliced(model, text, here, transcoders, sites),
        batch_size=batch_size,
        special_token_ids=special_token_ids,
        progress=progress,
    )


def spliced_set(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "sequences positions"],
    sites: Sequence[tuple[str, str]],
    widths: Sequence[int],
    observed: Callable[[Tensor, Tensor, Sequence[StreamingMetrics]], Tensor],
    spliced_in: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    special_token_ids: Iterable[int] | None,
    progress: bool,
) -> SplicedSet:
    """The losses and fidelities of whatever writes to the output hooks of `sites`.

    Args:
        transcoders: the modules to evaluate, in evaluation mode meanwhile.
        sites, widths: (input hook, output hook) and latents, one each for every output.
        observed: logits of the unchanged model on a batch's text and evaluated positions; what it
            finds goes into the metrics, one for every output.
        spliced_in: logits with every output replaced.
    """
    special = _special_token_ids(model, special_token_ids)
    tokens = _checked(model, tokens, batch_size).to(model.cfg.device)
    evaluated = evaluated_positions(tokens, special)
    counted = evaluated[:, :-1] & evaluated[:, 1:]
    n_predictions = int(counted.sum())
    if n_predictions < 1:
        raise ValueError(f"No prediction counts: special ids {special} leave no two tokens.")
    batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    metrics = [StreamingMetrics() for _ in sites]
    clean = spliced = ablated = 0.0
    with _evaluation_mode(model, *transcoders):
        for rows in tqdm(batches, desc="clean and spliced", disable=not progress):
            text, here, scored = tokens[rows], evaluated[rows], counted[rows]
            clean += _loss(observed(text, here, metrics), text, scored)
            spliced += _loss(spliced_in(text, here), text, scored)
        means = [found.mean for found in metrics]
        for rows in tqdm(batches, desc="mean-ablated", disable=not progress):
            logits = _ablated(model, tokens[rows], evaluated[rows], sites, means)
            ablated += _loss(logits, tokens[rows], counted[rows])
    return SplicedSet(
        n_predictions=n_predictions,
        loss_clean=clean / n_predictions,
        loss_spliced=spliced / n_predictions,
        loss_mean_ablated=ablated / n_predictions,
        layers=tuple(
            LayerFidelity(*site, width, found.fvu, found.l0, found.dead_share)
            for site, width, found in zip(
                sites, widths, (m.compute() for m in metrics), strict=True
            )
        ),
    )


def _observed(
    model: Any,
    text: Tensor,
    here: Bool[Tensor, "rows positions"],
    transcoders: Sequence[Any],
    sites: Sequence[tuple[str, str]],
    metrics: Sequence[StreamingMetrics],
) -> Float[Tensor, "rows positions vocabulary"]:
    """Logits of the unchanged model; each transcoder's errors go into its metrics."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for hook in {hook for site in sites for hook in site}:
            stack.enter_context(attached(model, hook, _keep(seen, hook)))
        logits = model(text, return_type="logits")
    for transcoder, (hook_in, hook_out), found in zip(transcoders, sites, metrics, strict=True):
        x, y = (_finite(flat_heads(seen[hook]), here, hook) for hook in (hook_in, hook_out))
        _reconstruct(transcoder, x, y, hook_in, hook_out, found.update)
    return logits


def _spliced(
    model: Any,
    text: Tensor,
    here: Bool[Tensor, "rows positions"],
    transcoders: Sequence[Any],
    sites: Sequence[tuple[str, str]],
) -> Float[Tensor, "rows positions vocabulary"]:
    seen: dict[str, Tensor] = {}

    def stand_in(transcoder: Any, hook_in: str, hook_out: str) -> Any:
        def replace(activation: Tensor) -> Tensor:
            flat = flat_heads(activation).clone()
            x = _finite(flat_heads(seen[hook_in]), here, hook_in)
            target = flat[here.to(flat.device)]
            made = _reconstruct(transcoder, x, target, hook_in, hook_out, None)
            flat[here.to(flat.device)] = made.to(flat)
            return flat.reshape(activation.shape)

        return replace

    with ExitStack() as stack:
        for transcoder, (hook_in, hook_out) in zip(transcoders, sites, strict=True):
            stack.enter_context(attached(model, hook_in, _keep(seen, hook_in)))
            stand = stand_in(transcoder, hook_in, hook_out)
            stack.enter_context(attached(model, hook_out, stand))
        return model(text, return_type="logits")


def _ablated(
    model: Any,
    text: Tensor,
    here: Bool[Tensor, "rows positions"],
    sites: Sequence[tuple[str, str]],
    means: Sequence[Float[Tensor, " d_out"]],
) -> Float[Tensor, "rows positions vocabulary"]:
    def constant(mean: Tensor) -> Any:
        def replace(activation: Tensor) -> Tensor:
            flat = flat_heads(activation).clone()
            flat[here.to(flat.device)] = mean.to(flat)
            return flat.reshape(activation.shape)

        return replace

    with ExitStack() as stack:
        for (_, hook_out), mean in zip(sites, means, strict=True):
            stack.enter_context(attached(model, hook_out, constant(mean)))
        return model(text, return_type="logits")


def _keep(seen: dict[str, Tensor], hook: str) -> Any:
    def keep(activation: Tensor) -> None:
        seen[hook] = activation

    return keep


def _refuse_set(transcoders: Sequence[Any], sites: Sequence[tuple[str, str]]) -> None:
    if not transcoders:
        raise ValueError("There are no transcoders to splice in; give at least one.")
    for transcoder in transcoders:
        require_folded(transcoder)
    outputs = [hook_out for _, hook_out in sites]
    twice = sorted({hook for hook in outputs if outputs.count(hook) > 1})
    if twice:
        raise ValueError(f"Two transcoders write to one hook: {', '.join(twice)}. Give one each.")
