"""The evaluation of a transcoder that SAELens' trainer calls during training.

SAELens' own evaluator splices an SAE at one hook with a scale of one number; a transcoder has two
of each. Here the scales are folded into a copy, an instance of SAELens' inference class, and the
copy is evaluated as it would be after training.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE
from sae_lens.training.prefetch import PrefetchingIterator

from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.saes.parameters import PairScale, fold_scales_
from jumprelu_plugin.saes.transcoder import JumpReLUTrainingTranscoder
from jumprelu_plugin.training.activations.pairs import PairStore
from jumprelu_plugin.training.activations.scaler import PairScaler


@dataclass
class TranscoderEvaluator:
    """Delta LM loss, FVU and L0 on the first `n_batches` batches of the training text."""

    model: Any
    store: PairStore
    n_batches: int

    def __call__(
        self, sae: JumpReLUTrainingTranscoder, data_provider: Any, activation_scaler: PairScaler
    ) -> dict[str, float]:
        excluded = self.store.exclude_special_tokens
        # A thread that reads ahead would run the model while it has the evaluation's hooks.
        ahead = isinstance(data_provider, PrefetchingIterator)
        with data_provider.paused() if ahead else nullcontext():
            result = evaluate(
                self.model,
                folded_copy(sae, activation_scaler.scaling_factor),
                self.store.first_sequences(self.n_batches * self.store.store_batch_size_prompts),
                batch_size=self.store.store_batch_size_prompts,
                special_token_ids=() if excluded is None else excluded.tolist(),
            )
        names = ("delta_loss", "fvu", "l0")
        return {f"evaluation/{name}": getattr(result, name) for name in names}


@torch.no_grad()
def folded_copy(sae: JumpReLUTrainingTranscoder, scales: PairScale | None) -> SAE[Any]:
    """The transcoder as it would be saved now, as SAELens' inference class.

    Args:
        scales: of the rows it was trained on; None where they were not scaled.
    """
    kind, config = get_sae_class(sae.cfg.architecture())
    fields = sae.cfg.get_inference_sae_cfg_dict()
    copy = kind(config.from_dict({**fields, "normalize_activations": "none"}))
    weights = dict(sae.state_dict())
    sae.process_state_dict_for_saving(weights)
    copy.load_state_dict({name: value.clone() for name, value in weights.items()})
    if scales is not None:
        fold_scales_(copy, *scales)
    return copy.to(sae.device)
