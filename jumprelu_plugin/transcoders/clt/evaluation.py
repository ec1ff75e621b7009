"""A cross-layer transcoder on a model: each output's fidelity, and the LM loss without any MLP.

As `evaluation.splice` does for a set of transcoders, and by its rules: fidelity is measured on the
unchanged model, and spliced in, latents read the model as the layers below have changed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.evaluation.loss import _finite
from jumprelu_plugin.evaluation.metrics import StreamingMetrics
from jumprelu_plugin.evaluation.splice import SplicedSet, _keep, spliced_set
from jumprelu_plugin.models.hooks import attached, flat_heads
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder


@torch.no_grad()
def evaluate_clt(
    model: Any,
    transcoder: CrossLayerTranscoder,
    tokens: Int[Tensor, "sequences positions"],
    *,
    batch_size: int = 8,
    special_token_ids: Iterable[int] | None = None,
    progress: bool = False,
) -> SplicedSet:
    """Losses of `model` with every output replaced, and each layer's FVU, L0 and dead latents.

    A layer's L0 and dead latents are of the latents that read it, its FVU of the output at it,
    which those of the layers before write to too. Three forward passes a batch; the model is left
    as it was found.

    Raises ValueError for hooks and widths that do not fit the model, and tokens that
    `delta_lm_loss` refuses.
    """
    refuse_widths(model, transcoder)
    sites = [(pair.hook_in, pair.hook_out) for pair in transcoder.cfg.pairs]
    return spliced_set(
        model,
        [transcoder],
        tokens,
        sites,
        [transcoder.cfg.d_sae] * len(sites),
        lambda text, here, metrics: _observed(model, text, here, transcoder, metrics),
        lambda text, here: _spliced(model, text, here, transcoder),
        batch_size=batch_size,
        special_token_ids=special_token_ids,
        progress=progress,
    )


def refuse_widths(model: Any, transcoder: CrossLayerTranscoder) -> None:
    """Raise ValueError where the transcoder's hooks or widths are not the model's."""
    cfg = transcoder.cfg
    widths = pair_widths(model, cfg.pairs)
    for pair in cfg.pairs:
        for hook, width in ((pair.hook_in, cfg.d_in), (pair.hook_out, cfg.d_out)):
            if widths[hook] != width:
                raise ValueError(
                    f"the transcoder has width {width} at {hook}, and the model {widths[hook]}: "
                    "it belongs to another model or another hook"
                )


def _observed(
    model: Any,
    text: Tensor,
    here: Bool[Tensor, "rows positions"],
    transcoder: CrossLayerTranscoder,
    metrics: Sequence[StreamingMetrics],
) -> Float[Tensor, "rows positions vocabulary"]:
    """Logits of the unchanged model; the errors at each output go into its metrics."""
    pairs = transcoder.cfg.pairs
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for hook in {hook for pair in pairs for hook in (pair.hook_in, pair.hook_out)}:
            stack.enter_context(attached(model, hook, _keep(seen, hook)))
        logits = model(text, return_type="logits")
    written = _Written(transcoder)
    for index, pair in enumerate(pairs):
        x, y = (
            _finite(flat_heads(seen[hook]), here, hook).to(transcoder.device)
            for hook in (pair.hook_in, pair.hook_out)
        )
        latents, output = written.next(index, x)
        metrics[index].update(y, output, latents)
    return logits


def _spliced(
    model: Any, text: Tensor, here: Bool[Tensor, "rows positions"], transcoder: CrossLayerTranscoder
) -> Float[Tensor, "rows positions vocabulary"]:
    seen: dict[str, Tensor] = {}
    written = _Written(transcoder)

    def stand_in(index: int, hook_in: str) -> Any:
        def replace(activation: Tensor) -> Tensor:
            flat = flat_heads(activation).clone()
            x = _finite(flat_heads(seen[hook_in]), here, hook_in).to(transcoder.device)
            flat[here.to(flat.device)] = written.next(index, x)[1].to(flat)
            return flat.reshape(activation.shape)

        return replace

    with ExitStack() as stack:
        for index, pair in enumerate(transcoder.cfg.pairs):
            stack.enter_context(attached(model, pair.hook_in, _keep(seen, pair.hook_in)))
            stack.enter_context(attached(model, pair.hook_out, stand_in(index, pair.hook_in)))
        return model(text, return_type="logits")


class _Written:
    """What the layers so far have written, as a forward pass goes up."""

    def __init__(self, transcoder: CrossLayerTranscoder):
        self._sources = transcoder.sources
        self._outputs: dict[int, Tensor] = {}

    def next(self, index: int, x: Float[Tensor, "tokens d_in"]) -> tuple[Tensor, Tensor]:
        """The latents of the next layer, and its output, to which no more will be added."""
        source = self._sources[index]
        latents = source.encode(x.to(source.W_enc.dtype))
        for step, part in enumerate(source.write(latents).unbind(-2)):
            before = self._outputs.get(index + step)
            self._outputs[index + step] = part if before is None else before + part
        return latents, self._outputs.pop(index) + source.b_dec
