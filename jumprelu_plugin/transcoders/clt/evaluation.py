"""A cross-layer transcoder on a model: each output's fidelity, and the LM loss without any MLP.

As `evaluation.spliced_set` does for a set of transcoders, and by its rules: fidelity is measured on
the unchanged model, and spliced in, latents read the model as the layers below have changed it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jumprelu_plugin.evaluation.spliced_set import Outputs, SplicedSet, spliced_set
from jumprelu_plugin.evaluation.splicing import Observe
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.running_outputs import RunningOutputs


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

    The arguments are `evaluation.evaluate_transcoders`', with one transcoder for all layers.

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
        lambda: _pass(transcoder),
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


def _pass(transcoder: CrossLayerTranscoder) -> Outputs:
    running = RunningOutputs()

    def output(index: int, x: Tensor, target: Tensor, observe: Observe | None) -> Tensor:
        source = transcoder.sources[index]
        latents = source.encode(x.to(source.W_enc))
        output = running.take(index, source.write(latents).unbind(-2)) + source.b_dec
        if observe is not None:
            observe(target.to(transcoder.device), output, latents)
        return output

    return output
