"""The loss of a model with a whole set of transcoders spliced in, and each one's own fidelity.

Each transcoder reads its input hook in the model as the others have changed it, as in a replacement
model of a circuit tool. The fidelity of each is measured on the unchanged model, so that errors of
the layers below do not count. splicing.py defines which tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.evaluation.splicing import (
    Observe,
    ScoredText,
    evaluation_mode,
    finite_activations,
    read_activations,
    reconstruct,
    replacement,
    special_token_ids_of,
)
from jumprelu_plugin.models.firing import require_firing
from jumprelu_plugin.models.hooks import attached, flat_heads, require_folded, sae_sites
from jumprelu_plugin.models.trained_on import sae_heads, trained_positions
from jumprelu_plugin.records import write_json

# Of the hook that is read and of the one that is written.
Heads = tuple[int | None, int | None]


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


class Outputs(Protocol):
    """What stands in for the model at each output, in one forward pass, from the first layer up."""

    def __call__(
        self,
        index: int,
        x: Float[Tensor, "tokens d_in"],
        target: Float[Tensor, "tokens d_out"],
        observe: Observe | None,
    ) -> Float[Tensor, "tokens d_out"]:
        """The output that stands in for `target`; `observe` is called as `reconstruct` calls it."""
        ...


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

    def output(index: int, x: Tensor, target: Tensor, observe: Observe | None) -> Tensor:
        return reconstruct(transcoders[index], x, target, *sites[index], observe)

    return spliced_set(
        model,
        transcoders,
        tokens,
        sites,
        [transcoder.cfg.d_sae for transcoder in transcoders],
        lambda: output,
        batch_size=batch_size,
        special_token_ids=special_token_ids_of(model, special_token_ids, transcoders),
        progress=progress,
        heads=[sae_heads(transcoder) for transcoder in transcoders],
        positions=[trained_positions(transcoder) for transcoder in transcoders],
    )


def spliced_set(
    model: Any,
    modules: Sequence[Any],
    tokens: Int[Tensor, "sequences positions"],
    sites: Sequence[tuple[str, str]],
    widths: Sequence[int],
    start_pass: Callable[[], Outputs],
    *,
    batch_size: int,
    special_token_ids: Iterable[int] | None,
    progress: bool,
    heads: Sequence[Heads] | None = None,
    positions: Iterable[slice] = (),
) -> SplicedSet:
    """The losses and fidelities of whatever writes to the output hooks of `sites`.

    Args:
        modules: what is evaluated, in evaluation mode meanwhile.
        sites, widths: (input hook, output hook) and latents, one each for every output.
        start_pass: gives what stands in, anew for each forward pass.
        heads: the one head of each site's hooks that is read and written; None for all heads.
        positions: slices of positions, in all of which a position is evaluated.
    """
    require_firing(model, *(hook for site in sites for hook in site))
    ids = special_token_ids_of(model, special_token_ids)
    text = ScoredText.of(model, tokens, ids, positions)
    places = _places(sites, heads)
    metrics = [StreamingMetrics() for _ in sites]
    clean = spliced = ablated = 0.0
    with evaluation_mode(model, *modules):
        for batch in text.batches(batch_size, "clean and spliced", progress):
            clean += batch.loss(_observed_pass(model, batch, places, start_pass(), metrics))
            spliced += batch.loss(_spliced_pass(model, batch, places, start_pass()))
        means = [found.mean for found in metrics]
        for batch in text.batches(batch_size, "mean-ablated", progress):
            ablated += batch.loss(_ablated_pass(model, batch, places, means))
    n_predictions = text.n_predictions
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


class _Place(NamedTuple):
    """The hooks and the heads that one dictionary of the set reads and writes."""

    hook_in: str
    hook_out: str
    head_in: int | None
    head_out: int | None


def _places(sites: Sequence[tuple[str, str]], heads: Sequence[Heads] | None) -> list[_Place]:
    heads = [(None, None)] * len(sites) if heads is None else heads
    return [_Place(*site, *pair) for site, pair in zip(sites, heads, strict=True)]


def _observed_pass(
    model: Any,
    batch: ScoredText,
    places: Sequence[_Place],
    output: Outputs,
    metrics: Sequence[StreamingMetrics],
) -> Float[Tensor, "rows positions vocabulary"]:
    """Logits of the unchanged model; the errors at each output go into its metrics."""
    heads = {place.hook_out: place.head_out for place in places}
    heads |= {place.hook_in: place.head_in for place in places}
    logits, seen = read_activations(model, batch.tokens, heads, heads)
    for index, place in enumerate(places):
        x, y = (
            finite_activations(seen[hook], batch.evaluated, hook)
            for hook in (place.hook_in, place.hook_out)
        )
        output(index, x, y, metrics[index].update)
    return logits


def _spliced_pass(
    model: Any, batch: ScoredText, places: Sequence[_Place], output: Outputs
) -> Float[Tensor, "rows positions vocabulary"]:
    seen: dict[str, Tensor] = {}

    def keep(hook: str) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            seen[hook] = activation

        return read

    def stand_in(index: int, place: _Place) -> Callable[[Tensor], Tensor]:
        def made(target: Tensor) -> Tensor:
            read = flat_heads(seen[place.hook_in], place.head_in)
            x = finite_activations(read, batch.evaluated, place.hook_in)
            return output(index, x, target, None)

        return replacement(batch.evaluated, made, place.head_out)

    with ExitStack() as stack:
        for index, place in enumerate(places):
            stack.enter_context(attached(model, place.hook_in, keep(place.hook_in)))
            stack.enter_context(attached(model, place.hook_out, stand_in(index, place)))
        return model(batch.tokens, return_type="logits")


def _ablated_pass(
    model: Any,
    batch: ScoredText,
    places: Sequence[_Place],
    means: Sequence[Float[Tensor, " d_out"]],
) -> Float[Tensor, "rows positions vocabulary"]:
    with ExitStack() as stack:
        for place, mean in zip(places, means, strict=True):
            ablate = replacement(batch.evaluated, mean, place.head_out)
            stack.enter_context(attached(model, place.hook_out, ablate))
        return model(batch.tokens, return_type="logits")


def _refuse_set(transcoders: Sequence[Any], sites: Sequence[tuple[str, str]]) -> None:
    if not transcoders:
        raise ValueError("There are no transcoders to splice in; give at least one.")
    for transcoder in transcoders:
        require_folded(transcoder)
    outputs = [hook_out for _, hook_out in sites]
    twice = sorted({hook for hook in outputs if outputs.count(hook) > 1})
    if twice:
        raise ValueError(f"Two transcoders write to one hook: {', '.join(twice)}. Give one each.")
