"""The same numbers as SAELens' `run_evals` on the same tokens, where both mean the same."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from jumprelu_plugin.evaluation import evaluate
from tests.tiny import HEADS, RESIDUAL, tiny_sae, tiny_tokens


def by_run_evals(model: Any, sae: Any, tokens: Tensor) -> dict[str, float]:
    """FVU, L0 and losses as `run_evals` has them, over all tokens in one batch."""
    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        streaming=False,
        hook_name=sae.cfg.metadata.hook_name,
        hook_head_index=None,
        context_size=tokens.shape[1],
        d_in=sae.cfg.d_in,
        n_batches_in_buffer=2,
        total_training_tokens=tokens.numel(),
        store_batch_size_prompts=len(tokens),
        train_batch_size_tokens=4,
        prepend_bos=True,
        normalize_activations="none",
        device="cpu",  # type: ignore[arg-type]
        dtype="float32",
    )
    cfg = EvalConfig(
        batch_size_prompts=len(tokens),
        n_eval_reconstruction_batches=1,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    found, features = run_evals(sae, store, model, ActivationScaler(), cfg)
    losses = found["model_performance_preservation"]
    return {
        "delta_loss": losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"],
        "loss_clean": losses["ce_loss_without_sae"],
        "fvu": 1 - found["reconstruction_quality"]["explained_variance"],
        "l0": found["sparsity"]["l0"],
        "densities": features["feature_density"],
        "squared_error": found["reconstruction_quality"]["mse"],
    }


@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_losses_fvu_and_l0_are_those_of_run_evals(models: Any, hook: str) -> None:
    sae, tokens = tiny_sae(hook), tiny_tokens(sequences=7, positions=13)
    theirs = by_run_evals(models.hooked, sae, tokens)
    ours = evaluate(models.hooked, sae, tokens, batch_size=3)
    assert abs(ours.delta_loss) > 1e-3 and ours.fvu > 0.01 and 1 < ours.l0 < 41
    for name in ("delta_loss", "loss_clean", "fvu", "l0"):
        assert getattr(ours, name) == pytest.approx(theirs[name], rel=1e-4), name
    assert ours.firing_frequency.tolist() == pytest.approx(theirs["densities"], rel=1e-6)
    # run_evals sums a token's squared error, `evaluate` has its mean over coordinates.
    assert ours.mse * sae.cfg.d_in == pytest.approx(theirs["squared_error"], rel=1e-4)


def test_predictions_of_special_tokens_are_counted_by_run_evals_alone(
    models: Any, tokens: Tensor
) -> None:
    """On packed and padded text: an end of text, a beginning and padding as what is predicted."""
    sae = tiny_sae()
    theirs, ours = by_run_evals(models.hooked, sae, tokens), evaluate(models.hooked, sae, tokens)
    for name in ("fvu", "l0"):
        assert getattr(ours, name) == pytest.approx(theirs[name], rel=1e-4), name
    # From tokens that are text, 2 more predictions: each row's end of text. None from its last.
    assert ours.n_predictions == 7 * 11 - 3 - 4
    every = ours.n_predictions + 2
    model = models.hooked
    logits = model(tokens, return_type="logits").log_softmax(-1)
    special = -logits[2, 4, tokens[2, 5]] - logits[4, 8, tokens[4, 9]]
    expected = (ours.loss_clean * ours.n_predictions + float(special)) / every
    assert theirs["loss_clean"] == pytest.approx(expected, rel=1e-4)
    assert theirs["loss_clean"] != pytest.approx(ours.loss_clean, rel=1e-4)
