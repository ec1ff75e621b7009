"""Configs: the same through a dict, through the runner's config and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.synthetic.synthetic_model import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunnerConfig

from tests.contract.conftest import Outcome
from tests.contract.stock import FIELDS, config, run_config
from tests.tiny import RESIDUAL

EVERY = pytest.mark.parametrize("architecture", FIELDS)


@EVERY
def test_a_config_through_its_dict_is_equal(architecture: str, outcome: Outcome) -> None:
    given = config(architecture, normalize_activations="layer_norm", apply_b_dec_to_input=False)
    read = TrainingSAEConfig.from_dict(given.to_dict())
    assert read == given and given == read
    assert read.to_dict() == given.to_dict()
    outcome.same("dict", read.to_dict())


@EVERY
def test_unknown_keys_are_dropped_and_metadata_is_kept(architecture: str, outcome: Outcome) -> None:
    given = config(architecture, metadata=SAEMetadata(hook_name=RESIDUAL, note=[3, 5]))
    read = TrainingSAEConfig.from_dict({**given.to_dict(), "model_name": "tiny", "lr": 3.0})
    assert read == given
    assert read.metadata.hook_name == RESIDUAL and read.metadata.note == [3, 5]
    assert read.metadata.no_such_entry is None
    outcome.same("dict", read.to_dict())


@EVERY
def test_it_is_saved_as_the_documented_architecture(architecture: str, outcome: Outcome) -> None:
    saved = config(architecture).get_inference_sae_cfg_dict()
    as_jumprelu = {"batchtopk", "matryoshka_batchtopk", "jumprelu"}
    assert saved["architecture"] == ("jumprelu" if architecture in as_jumprelu else architecture)
    assert SAEConfig.from_dict(saved).architecture() == saved["architecture"]
    outcome.same("dict", saved)


@EVERY
def test_a_runner_s_config_through_its_dict(
    architecture: str, outcome: Outcome, tmp_path: Path
) -> None:
    given = run_config(config(architecture), Path("elsewhere"))
    # SAELens adds a random part to the folder of a run's checkpoints.
    given.checkpoint_path = "checkpoints"
    read = LanguageModelSAERunnerConfig.from_dict(given.to_dict())
    read.checkpoint_path = "checkpoints"
    assert read.sae == given.sae
    assert read.to_dict() == given.to_dict()
    outcome.same("dict", read.to_dict())


@EVERY
def test_a_synthetic_runner_s_config_through_its_dict(architecture: str, outcome: Outcome) -> None:
    given = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=31, hidden_dim=33, seed=3),
        sae=config(architecture),
        training_samples=7 * 53,
        batch_size=53,
        logger=LoggingConfig(log_to_wandb=False),
    )
    read = SyntheticSAERunnerConfig.from_dict(given.to_dict())
    assert read.to_dict() == given.to_dict()
    outcome.same("dict", read.to_dict())


@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "jumprelu"])
def test_flags_give_the_config(architecture: str, outcome: Outcome) -> None:
    given = FIELDS[architecture]
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    read = _parse_cfg_args(
        ["--architecture", architecture, "--d_in", "23", "--d_sae", "37", "--lr", "0.003",
         "--log_to_wandb", "false", "--checkpoint_path", "c", *flags]
    )  # fmt: skip
    assert read.sae.architecture() == architecture
    found = {name: getattr(read.sae, name) for name in ("d_in", "d_sae", *given)}
    assert found == {"d_in": 23, "d_sae": 37, **given}
    outcome.same("fields", found)
    outcome.same("lr", read.lr)


@pytest.mark.parametrize("target", [None, 0.0, 10_000.0])
def test_the_quadratic_loss_needs_a_target(target: float | None) -> None:
    given = config("jumprelu", jumprelu_sparsity_loss_mode="quadratic", target_l0=target)
    with pytest.raises(ValueError, match="target_l0"):
        TrainingSAE.from_dict(given.to_dict())


@EVERY
def test_a_normalization_that_does_not_exist_is_refused(
    architecture: str, outcome: Outcome
) -> None:
    with pytest.raises(ValueError, match="no_such") as refused:
        config(architecture, normalize_activations="no_such")
    outcome.same("message", str(refused.value))
