"""The runners: of a language model, of several SAEs at once, of synthetic data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.synthetic.firing_probabilities import ConstantFiringProbabilityConfig
from sae_lens.synthetic.synthetic_model import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig
from safetensors.torch import load_file

from tests.contract.conftest import Outcome
from tests.contract.stock import (
    BATCH,
    CLOSE,
    CONTEXT,
    FIELDS,
    STEPS,
    config,
    dataset,
    run_config,
    weights,
)
from tests.contract.test_trainer import keep
from tests.tiny import D_MODEL, MLP, RESIDUAL, WIDTH

EVERY = pytest.mark.parametrize("architecture", FIELDS)


def run(model: Any, cfg: Any, **options: Any) -> TrainingSAE[Any]:
    torch.manual_seed(31)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset(), override_model=model, **options
    )
    return runner.run()


@EVERY
def test_a_language_model_s_run(
    architecture: str, model: Any, outcome: Outcome, tmp_path: Path
) -> None:
    sae = config(architecture, normalize_activations="expected_average_only_in")
    trained = run(model, run_config(sae, tmp_path))
    keep(outcome, architecture, "weights", weights(trained))

    output = tmp_path / "output"
    files = {path.name for path in output.iterdir()}
    assert files == {
        "cfg.json", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
    }  # fmt: skip
    saved = json.loads((output / "cfg.json").read_text())
    assert saved["metadata"]["hook_name"] == RESIDUAL
    measured = {n: saved["metadata"].pop(n) for n in ("l0", "l1", "ve") if n in saved["metadata"]}
    keep(outcome, architecture, "measured", measured)
    # Of the run's folder, which differs.
    saved["metadata"].pop("training_architecture_details", None)
    outcome.same("cfg.json", without_folders(saved))
    keep(outcome, architecture, "saved", load_file(output / "sae_weights.safetensors"))
    keep(outcome, architecture, "density", load_file(output / "sparsity.safetensors"))
    loaded = SAE.load_from_disk(output)
    assert type(loaded).__module__.startswith("sae_lens.")
    x = torch.randn(BATCH, D_MODEL)
    keep(outcome, architecture, "reconstruction", loaded(x))
    (checkpoints,) = (tmp_path / "checkpoints").iterdir()
    outcome.same("checkpoints", sorted(path.name for path in checkpoints.iterdir()))


def without_folders(value: Any) -> Any:
    """A config without the folder of this run, whose name is random."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items() if not k.endswith("_path")}
    return value


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_run_from_a_checkpoint_and_from_a_folder(
    architecture: str, model: Any, outcome: Outcome, tmp_path: Path
) -> None:
    sae = config(architecture)
    first = run(model, run_config(sae, tmp_path / "first"))
    (checkpoints,) = (tmp_path / "first" / "checkpoints").iterdir()
    middle = min(checkpoints.iterdir(), key=lambda path: int(path.name))
    resumed = run(model, run_config(sae, tmp_path / "second", resume_from_checkpoint=str(middle)))
    keep(outcome, architecture, "resumed", weights(resumed))

    again = run_config(sae, tmp_path / "third", from_pretrained_path=str(middle))
    continued = run(model, again)
    assert not torch.equal(continued.W_dec, first.W_dec)
    keep(outcome, architecture, "continued", weights(continued))


def test_an_sae_of_one_s_own_is_trained(model: Any, outcome: Outcome, tmp_path: Path) -> None:
    own = TrainingSAE.from_dict(config("topk").to_dict())
    assert run(model, run_config(config("topk"), tmp_path), override_sae=own) is own
    outcome.same("weights", weights(own))


def test_several_saes_at_once(model: Any, outcome: Outcome, tmp_path: Path) -> None:
    hooks = {name: MLP if name == "topk" else RESIDUAL for name in FIELDS}
    torch.manual_seed(37)
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={name: config(name, d_in=WIDTH[hooks[name]]) for name in FIELDS},
            hook_names=hooks,
            context_size=CONTEXT,
            training_tokens=STEPS * BATCH,
            train_batch_size_tokens=BATCH,
            store_batch_size_prompts=5,
            n_batches_in_buffer=7,
            lr=3e-3,
            n_checkpoints=1,
            checkpoint_path=str(tmp_path / "checkpoints"),
            output_path=str(tmp_path / "output"),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        override_model=model,
        override_dataset=dataset(),
    )
    trained = runner.run()
    assert trained.keys() == FIELDS.keys()
    for name, sae in trained.items():
        keep(outcome, name, f"weights of {name}", weights(sae))
        loaded = SAE.load_from_disk(tmp_path / "output" / name)
        assert loaded.cfg.metadata.hook_name == hooks[name]


@EVERY
def test_synthetic_data(architecture: str, outcome: Outcome, tmp_path: Path) -> None:
    torch.manual_seed(41)
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=59,
                hidden_dim=D_MODEL,
                firing_probability=ConstantFiringProbabilityConfig(probability=0.07),
                seed=3,
            ),
            sae=config(architecture),
            training_samples=STEPS * BATCH,
            batch_size=BATCH,
            lr=3e-3,
            eval_samples=5 * BATCH,
            checkpoint_path=None,
            output_path=str(tmp_path),
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    result = runner.run()
    assert result.final_eval is not None
    keep(outcome, architecture, "weights", weights(result.sae))
    scores = {n: float(v) for n, v in asdict(result.final_eval).items() if isinstance(v, float)}
    assert scores
    if architecture == "jumprelu":  # rounding may move an activation over its threshold
        outcome.close("scores", scores, 100 * CLOSE)
    else:
        outcome.same("scores", scores)
    outcome.same("files", sorted(path.name for path in tmp_path.iterdir()))
