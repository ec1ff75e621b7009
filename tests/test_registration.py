"""`architecture="jumprelu"` after the import: ours to train, stock to save."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_training_class,
)
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.synthetic.firing_probabilities import ConstantFiringProbabilityConfig
from sae_lens.synthetic.synthetic_model import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig

import jumprelu_plugin
from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, registration
from tests.tiny import D_MODEL, RESIDUAL, tiny_hf, tiny_hooked, tiny_tokenizer, tiny_tokens

StockConfig = sae_lens.JumpReLUTrainingSAEConfig
OURS = (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
STOCK = (StockSAE, StockConfig)
QUIET = {"log_to_wandb": False}


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    jumprelu_plugin.register()


def test_importing_registers_the_training_entry_alone() -> None:
    assert jumprelu_plugin.is_registered()
    assert SAE_TRAINING_CLASS_REGISTRY["jumprelu"] == OURS
    assert SAE_CLASS_REGISTRY["jumprelu"] == (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig)
    others = [cls for name, (cls, _) in SAE_TRAINING_CLASS_REGISTRY.items() if name != "jumprelu"]
    assert others
    assert all(c.__module__.startswith(("sae_lens.", "jumprelu_plugin.")) for c in others)


def test_register_and_unregister_are_idempotent_and_reversible(restored: None) -> None:
    for _ in range(3):
        jumprelu_plugin.unregister()
        assert SAE_TRAINING_CLASS_REGISTRY["jumprelu"] == STOCK
        assert not jumprelu_plugin.is_registered()
    for _ in range(3):
        jumprelu_plugin.register()
        assert SAE_TRAINING_CLASS_REGISTRY["jumprelu"] == OURS
        assert jumprelu_plugin.is_registered()
    jumprelu_plugin.unregister()
    assert SAE_TRAINING_CLASS_REGISTRY["jumprelu"] == STOCK


# ---------------------------------------------------------------- stock configs


def stock_config(**fields: Any) -> StockConfig:
    return StockConfig(**{"d_in": 23, "d_sae": 101, "l0_coefficient": 0.7, **fields})


def test_a_stock_config_through_its_dict_trains_as_stock() -> None:
    given = stock_config(jumprelu_bandwidth=0.043, l0_warm_up_steps=13, decoder_init_norm=0.3)
    cfg = TrainingSAEConfig.from_dict(given.to_dict())
    assert type(cfg) is JumpReLUTrainingSAEConfig
    for name, value in vars(given).items():
        if name != "metadata":
            assert getattr(cfg, name) == value, name
    sae = TrainingSAE.from_dict(cfg.to_dict())
    assert type(sae) is JumpReLUTrainingSAE
    assert_stock_behaviour(sae, given)


def test_a_stock_config_object_trains_as_stock() -> None:
    given = stock_config(jumprelu_bandwidth=0.043, l0_warm_up_steps=13, decoder_init_norm=0.3)
    assert_stock_behaviour(get_sae_training_class("jumprelu")[0](given), given)


def assert_stock_behaviour(sae: Any, given: StockConfig) -> None:
    """Fixed λ, free decoder, θ and ε as given, SAELens' parameters and schedule."""
    stock = StockSAE(given)
    assert sae.get_coefficients() == stock.get_coefficients()
    assert sae.control.l0 is None
    assert not sae.cfg.unit_norm_decoder
    assert sae.bandwidth == given.jumprelu_bandwidth
    assert {n: p.shape for n, p in sae.state_dict().items()} == {
        n: p.shape for n, p in stock.state_dict().items()
    }
    torch.testing.assert_close(sae.threshold, stock.threshold, rtol=0, atol=0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((101,), 0.3))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"jumprelu_init_threshold": 0.37},
        {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 2.3},
        {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 11.0},
        {"normalize_activations": "layer_norm", "dtype": "bfloat16"},
        {"normalize_activations": "covariance_whitening", "decoder_init_norm": None},
        {"apply_b_dec_to_input": False, "pre_act_loss_coefficient": 3e-6},
    ],
)
def test_every_stock_config_is_taken(fields: dict[str, Any]) -> None:
    given = stock_config(**fields)
    StockSAE(given)  # what SAELens trains, this package trains
    sae = TrainingSAE.from_dict(given.to_dict())
    assert type(sae) is JumpReLUTrainingSAE


# ---------------------------------------------------------------- stock checkpoints


def loaded_by(classes: tuple[type, type], folder: Path) -> Any:
    """The training SAE SAELens loads from a folder with these classes registered."""
    jumprelu_plugin.unregister()
    if classes == OURS:
        jumprelu_plugin.register()
    sae = TrainingSAE.load_from_disk(folder)
    assert (type(sae), type(sae.cfg)) == classes
    return sae


def assert_same_state(found: Any, expected: Any) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def randomise(sae: Any) -> None:
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        sae.threshold.abs_()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stock_checkpoint_loads_into_the_plugin(
    tmp_path: Path, restored: None, dtype: str
) -> None:
    stock = StockSAE(stock_config(dtype=dtype))
    randomise(stock)
    stock.save_model(tmp_path)
    resumed = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig.from_dict(stock.cfg.to_dict()))
    resumed.load_weights_from_checkpoint(tmp_path)
    assert_same_state(resumed, stock)
    # `load_from_disk` casts the threshold to the SAE's dtype on its way, with stock classes too.
    assert_same_state(loaded_by(OURS, tmp_path), loaded_by(STOCK, tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_the_plugin_loads_into_stock(
    tmp_path: Path, restored: None, dtype: str
) -> None:
    ours = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig.from_dict(stock_config(dtype=dtype).to_dict())
    )
    randomise(ours)
    ours.save_model(tmp_path)
    resumed = StockSAE(stock_config(dtype=dtype))
    resumed.load_weights_from_checkpoint(tmp_path)
    assert_same_state(resumed, ours)
    loaded = loaded_by(STOCK, tmp_path)
    assert_same_state(loaded, loaded_by(OURS, tmp_path))
    assert loaded.cfg.l0_coefficient == 0.7


# ---------------------------------------------------------------- the other runners


def test_synthetic_runner_trains_the_plugin_s_class() -> None:
    torch.manual_seed(4)
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=31,
                hidden_dim=13,
                firing_probability=ConstantFiringProbabilityConfig(probability=0.1),
                seed=3,
            ),
            sae=stock_config(d_in=13, d_sae=29),
            training_samples=7 * 53,
            batch_size=53,
            eval_samples=530,
            output_path=None,
            checkpoint_path=None,
            n_batches_for_norm_estimate=3,
            logger=LoggingConfig(**QUIET),
        )
    )
    assert type(runner.sae) is JumpReLUTrainingSAE
    before = runner.sae.W_dec.detach().clone()
    result = runner.run()
    assert not torch.equal(result.sae.W_dec, before)
    assert result.final_eval is not None


def test_multi_sae_runner_trains_the_plugin_s_class(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    model = tiny_hooked(tiny_hf(), tokenizer)
    config = MultiSAETrainingRunnerConfig(
        saes={
            "stock": stock_config(d_in=D_MODEL, d_sae=41),
            "steered": JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=43, target_l0=5),
        },
        hook_names=RESIDUAL,
        context_size=13,
        training_tokens=3 * 26,
        train_batch_size_tokens=26,
        store_batch_size_prompts=2,
        n_batches_in_buffer=4,
        n_batches_for_norm_estimate=2,
        checkpoint_path=None,
        output_path=str(tmp_path / "output"),
        logger=LoggingConfig(**QUIET),
    )
    runner = MultiSAETrainingRunner(
        config,
        override_model=model,
        override_dataset=Dataset.from_dict({"tokens": tiny_tokens(60).tolist()}),
    )
    # torch's parametrizations make a subclass of their own.
    assert {name: isinstance(sae, JumpReLUTrainingSAE) for name, sae in runner.saes.items()} == {
        "stock": True,
        "steered": True,
    }
    before = {name: sae.W_dec.detach().clone() for name, sae in runner.saes.items()}
    for name, sae in runner.run().items():
        assert not torch.equal(sae.W_dec, before[name])
        assert (sae.control.l0 is not None) == (name == "steered")
        assert sae.W_dec.isfinite().all()


def test_a_stock_config_survives_a_round_trip_equal() -> None:
    given = stock_config(jumprelu_bandwidth=0.043, l0_warm_up_steps=13, jumprelu_tanh_scale=2.0)
    again = TrainingSAEConfig.from_dict(given.to_dict())
    assert again == given and given == again
    assert again.to_dict() == given.to_dict()
    assert again != stock_config(jumprelu_bandwidth=0.044, l0_warm_up_steps=13)
    run = LanguageModelSAERunnerConfig(
        sae=given, logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None
    )
    read = LanguageModelSAERunnerConfig.from_dict(run.to_dict())
    assert read.sae == run.sae and read.to_dict()["sae"] == run.to_dict()["sae"]


def test_one_of_our_configs_survives_a_round_trip_with_every_field() -> None:
    ours = JumpReLUTrainingSAEConfig(d_in=23, d_sae=101, target_l0=7.0, max_latent_density=0.3)
    again = TrainingSAEConfig.from_dict(ours.to_dict())
    assert again == ours and again.to_dict()["max_latent_density"] == 0.3
    assert again != dataclasses.replace(ours, max_latent_density=0.4)


# ---------------------------------------------------------------- versions


def registered_with(monkeypatch: pytest.MonkeyPatch, **found: str) -> list[str]:
    """The warnings of three registrations beside these versions."""
    given = {name.replace("_", "-"): version for name, version in found.items()}
    monkeypatch.setattr(registration, "version", given.__getitem__)
    registration._warn_of_untested_versions.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            jumprelu_plugin.register()
    registration._warn_of_untested_versions.cache_clear()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("found", ["6.54.1", "6.54.13", "6.100.0", "7.0.0rc1"])
def test_an_untested_saelens_is_named_once(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    said = registered_with(monkeypatch, sae_lens=found, transformer_lens="3.9.0")
    assert len(said) == 1
    assert f"sae-lens {found} is installed" in said[0] and "6.54.2 to 6.54.12" in said[0]
    assert "pip install sae-lens==6.54.12" in said[0] and "\n" not in said[0]


def test_an_untested_transformer_lens_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = registered_with(monkeypatch, sae_lens="6.54.7", transformer_lens="3.10.0")
    assert "transformer-lens 3.10.0 is installed" in said and "tested with 3.9.0." in said


def test_tested_versions_are_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("6.54.2", "6.54.9", "6.54.12"):
        assert registered_with(monkeypatch, sae_lens=found, transformer_lens="3.9.0") == []


def test_the_tested_versions_are_those_that_are_installed_for_tests() -> None:
    root = Path(__file__).parents[1]
    oldest = dict(line.split("==") for line in (root / "tools/oldest.txt").read_text().split())
    newest = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line
    )
    bounds = (root / "pyproject.toml").read_text()
    for name, versions in registration.TESTED_VERSIONS.items():
        assert versions == (oldest[name], newest[name])
        assert f'"{name}>={oldest[name].removesuffix(".0")},<' in bounds
