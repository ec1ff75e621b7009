"""SAETrainer on activations of one's own: what it trains, counts, saves and goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from tests.contract.conftest import Outcome
from tests.contract.stock import BATCH, CLOSE, FIELDS, STEPS, config, weights
from tests.tiny import D_MODEL

EVERY = pytest.mark.parametrize("architecture", FIELDS)


def activations(steps: int = STEPS + 7, seed: int = 5) -> Tensor:
    """[steps, batch, d_in]: few directions at a time, on a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(59, D_MODEL, generator=generator)
    active = torch.rand(steps, BATCH, 59, generator=generator) < 0.07
    return 0.3 + (active * torch.rand(active.shape, generator=generator)) @ directions


def trainer(architecture: str, data: Iterator[Tensor], **fields: Any) -> SAETrainer[Any, Any]:
    evaluator = fields.pop("evaluator", None)
    sae_fields = fields.pop("sae", {})
    given = {
        "total_training_samples": STEPS * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 3e-3,
        "lr_end": 3e-4,
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 5,
        "dead_feature_window": 7,
        "feature_sampling_window": 11,
    }
    torch.manual_seed(17)
    sae = TrainingSAE.from_dict(config(architecture, **sae_fields).to_dict())
    return SAETrainer(SAETrainerConfig(**{**given, **fields}), sae, data, evaluator)


def keep(outcome: Outcome, architecture: str, name: str, value: Any) -> None:
    if architecture == "jumprelu":
        outcome.close(name, value, CLOSE)
    else:
        outcome.same(name, value)


@EVERY
def test_a_training_run(architecture: str, outcome: Outcome, tmp_path: Path) -> None:
    run = trainer(architecture, iter(activations()))
    outcome.same("initial weights", weights(run.sae))
    outcome.same("coefficients", run.get_coefficients())
    before = weights(run.sae)
    trained = run.fit()
    assert trained is run.sae
    assert run.n_training_steps == STEPS and run.n_training_samples == STEPS * BATCH
    assert not torch.equal(weights(trained)["W_dec"], before["W_dec"])
    keep(outcome, architecture, "weights", weights(trained))
    outcome.same("final coefficients", run.get_coefficients())

    trained.save_inference_model(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    loaded = SAE.load_from_disk(tmp_path)
    x = activations(1, seed=6)[0]
    trained.eval()
    assert type(loaded).__module__.startswith("sae_lens.")
    if architecture not in ("batchtopk", "matryoshka_batchtopk"):  # saved with a fixed threshold
        torch.testing.assert_close(loaded.encode(x), trained.encode(x))
    torch.testing.assert_close(loaded(x), loaded.decode(loaded.encode(x)))
    keep(outcome, architecture, "reconstruction", loaded(x))


@pytest.mark.parametrize(
    "normalization", ["expected_average_only_in", "constant_norm_rescale", "layer_norm"]
)
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_normalizations(architecture: str, normalization: str, outcome: Outcome) -> None:
    run = trainer(
        architecture,
        iter(activations(STEPS + 11)),
        sae={"normalize_activations": normalization},
        n_batches_for_norm_estimate=5,
    )
    trained = run.fit()
    if normalization == "expected_average_only_in":  # folded into the weights when it is done
        assert trained.cfg.normalize_activations == "none"
    keep(outcome, architecture, "weights", weights(trained))


@EVERY
def test_checkpoints_and_going_on(architecture: str, outcome: Outcome, tmp_path: Path) -> None:
    data = activations()
    whole = trainer(
        architecture,
        iter(data),
        n_checkpoints=2,
        checkpoint_path=str(tmp_path),
        save_final_checkpoint=True,
    )
    whole.fit()
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 3 and f"final_{STEPS * BATCH}" in folders
    outcome.same("folders", folders)
    middle = min(int(name) for name in folders if name.isdigit())
    steps = middle // BATCH
    files = {path.name for path in (tmp_path / str(middle)).iterdir()}
    # More files may lie beside SAELens'.
    assert {"cfg.json", "sae_weights.safetensors", "trainer_state.pt"} <= files

    resumed = trainer(architecture, iter(data[steps:]))
    resumed.load_trainer_state(tmp_path / str(middle))
    resumed.sae.load_weights_from_checkpoint(tmp_path / str(middle))
    assert resumed.n_training_samples == middle
    trained = resumed.fit()
    for name, value in weights(whole.sae).items():
        torch.testing.assert_close(weights(trained)[name], value)
    keep(outcome, architecture, "weights", weights(trained))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_one_s_own_buffer_and_evaluator(architecture: str, outcome: Outcome) -> None:
    seen: list[float] = []

    def error(sae: TrainingSAE[Any], data: Iterator[Tensor], _: ActivationScaler) -> dict[str, Any]:
        with torch.no_grad():
            batch = next(data)
            seen.append(float((sae(batch) - batch).pow(2).mean()))
        return {"error": seen[-1]}

    torch.manual_seed(29)
    data = mixing_buffer(
        buffer_size=5 * BATCH, batch_size=BATCH, activations_loader=iter(activations(STEPS + 40))
    )
    run = trainer(architecture, data, evaluator=error)
    run.fit()
    keep(outcome, architecture, "weights", weights(run.sae))
    assert run.evaluator is error
    first = error(run.sae, data, run.activation_scaler)
    assert first["error"] == seen[-1]
    keep(outcome, architecture, "error", first["error"])


@EVERY
def test_a_step_returns_what_the_documentation_lists(architecture: str, outcome: Outcome) -> None:
    run = trainer(architecture, iter(activations()))
    output = run.step(activations(1)[0])
    acts = output.feature_acts.to_dense()
    assert acts.shape == (BATCH, run.sae.cfg.d_sae)
    assert output.sae_out.shape == output.sae_in.shape == (BATCH, D_MODEL)
    outcome.same("losses", sorted(output.losses))
    for name, loss in output.losses.items():
        keep(outcome, architecture, f"loss {name}", float(loss))
    outcome.same("active", (acts != 0))
    log = run.build_train_step_log_dict(output, run.n_training_samples)
    outcome.same("metrics", sorted(name for name in log if name.startswith(("losses", "metrics"))))
