"""The same numbers as SAEBench's `core` on the same tokens, and what its other numbers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore

from jumprelu_plugin.evaluation import evaluate
from tests.dictionaries import needs
from tests.tiny import BOS, EOS, HEADS, PAD, RESIDUAL, tiny_sae, tiny_tokens

SPECIAL, BATCH, BATCHES, POSITIONS = {BOS, EOS, PAD}, 3, 2, 13


@pytest.fixture(scope="module", params=[RESIDUAL, HEADS])
def both(
    models: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """An SAE saved and loaded, evaluated by SAEBench in two batches, and by this package."""
    needs("sae_bench")
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    folder = tmp_path_factory.mktemp("saebench")
    sae = tiny_sae(request.param)
    sae.cfg.metadata.prepend_bos = True
    sae.save_model(folder / "sae")
    sae = SAE.load_from_disk(folder / "sae")
    sae.fold_W_dec_norm()
    _, sae, _ = load_and_format_sae("plugin", sae, "cpu")  # type: ignore[misc]
    tokens = tiny_tokens(sequences=BATCH * BATCHES, positions=POSITIONS)
    store = ActivationsStore.from_sae(
        models.hooked,
        sae,
        context_size=POSITIONS,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
    )
    config = CoreEvalConfig(
        model_name="tiny-gemma-2-test",
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=BATCHES,
        n_eval_sparsity_variance_batches=BATCHES,
        exclude_special_tokens_from_reconstruction=True,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, latents = core.run_evals(sae, store, models.hooked, config, ignore_tokens=SPECIAL)
    metrics["misc_metrics"] = core.calculate_misc_metrics(latents)
    found = {"sae_set": "plugin", "sae_id": "tiny", "eval_cfg": config, "metrics": metrics}
    found["feature_metrics"] = latents
    clean = core.replace_nans_with_negative_one(found)
    path = str(folder / "core.json")
    core.save_single_eval_result(clean, "id", "lens", "bench", path, sae)
    return {
        "saebench": {name: v for group in metrics.values() for name, v in group.items()},
        "densities": latents["feature_density"],
        "ours": evaluate(models.hooked, sae, tokens, batch_size=5),
        "file": Path(path),
        "x": activations(models.hooked, request.param, tokens),
        "sae": sae,
    }


def activations(model: Any, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    """Of all but BOS, heads flattened."""
    _, cache = model.run_with_cache(tokens, names_filter=hook)
    return cache[hook][:, 1:].flatten(0, 1).flatten(1).detach()


def test_what_both_define_alike_agrees(both: dict[str, Any]) -> None:
    saebench, ours = both["saebench"], both["ours"]
    assert ours.n_tokens == BATCH * BATCHES * (POSITIONS - 1) and 1 < ours.l0 < 41
    assert abs(ours.delta_loss) > 1e-3
    delta = saebench["ce_loss_with_sae"] - saebench["ce_loss_without_sae"]
    assert delta == pytest.approx(ours.delta_loss, rel=1e-3)  # a difference of float32 means
    for theirs, value in {
        "ce_loss_without_sae": ours.loss_clean,
        "ce_loss_with_sae": ours.loss_spliced,
        "l0": ours.l0,
        "cossim": ours.cosine,
        "frac_alive": 1 - ours.dead_share,
        "freq_over_1_percent": ours.share_above_1_percent,
        "freq_over_10_percent": ours.share_above_10_percent,
    }.items():
        assert saebench[theirs] == pytest.approx(value, rel=1e-4), theirs
    assert ours.firing_frequency.tolist() == pytest.approx(both["densities"], rel=1e-6)


def test_its_squared_error_is_divided_by_the_tokens_of_a_batch(both: dict[str, Any]) -> None:
    ours, tokens_a_batch = both["ours"], BATCH * (POSITIONS - 1)
    expected = ours.mse * ours.d_in / tokens_a_batch
    assert both["saebench"]["mse"] == pytest.approx(expected, rel=1e-4)


def test_its_explained_variance_is_about_no_mean(both: dict[str, Any]) -> None:
    """E‖x‖² less the square of E‖x‖²/d stands where the variance about the mean should."""
    x, ours = both["x"].double(), both["ours"]
    squares = x.square().sum(-1).mean()
    denominator = squares - (squares / x.shape[1]) ** 2
    expected = 1 - ours.mse * ours.d_in / denominator
    assert both["saebench"]["explained_variance"] == pytest.approx(float(expected), rel=1e-4)
    assert both["saebench"]["explained_variance"] != pytest.approx(1 - ours.fvu, rel=1e-2)


def test_its_ablation_also_zeroes_the_first_position(both: dict[str, Any], models: Any) -> None:
    tokens = tiny_tokens(sequences=BATCH * BATCHES, positions=POSITIONS)
    losses = models.hooked.run_with_hooks(
        tokens,
        return_type="loss",
        loss_per_token=True,
        fwd_hooks=[(both["ours"].hook, lambda x, hook: torch.zeros_like(x))],
    )
    ablated = losses[:, 1:].mean().item()
    saebench, ours = both["saebench"], both["ours"]
    assert saebench["ce_loss_with_ablation"] == pytest.approx(ablated, rel=1e-4)
    assert ours.loss_zero_ablated != pytest.approx(ablated, rel=1e-4)
    score = (ablated - ours.loss_spliced) / (ablated - ours.loss_clean)
    assert saebench["ce_loss_score"] == pytest.approx(score, rel=1e-3)


def test_its_result_file_holds_every_group(both: dict[str, Any]) -> None:
    written = json.loads(both["file"].read_text())
    assert written["eval_type_id"] == "core"
    assert written["eval_result_metrics"]["sparsity"]["l0"] == both["saebench"]["l0"]
    assert len(written["eval_result_details"]) == both["sae"].cfg.d_sae
