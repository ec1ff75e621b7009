"""Architectures by name: found, refused twice, and one's own added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from tests.contract.conftest import Outcome
from tests.contract.stock import BATCH, D_SAE, FIELDS, weights
from tests.tiny import D_MODEL

OWN = "halved"


@dataclass
class HalvedConfig(StandardTrainingSAEConfig):
    """A user's own architecture."""

    factor: float = 0.5

    @classmethod
    def architecture(cls) -> str:
        return OWN

    def get_inference_config_class(self) -> type[StandardSAEConfig]:
        return StandardSAEConfig


class Halved(StandardTrainingSAE):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.cfg.factor * super().encode(x)  # type: ignore[attr-defined]


@pytest.fixture
def own() -> Iterator[None]:
    register_sae_class(OWN, StandardSAE, StandardSAEConfig)
    register_sae_training_class(OWN, Halved, HalvedConfig)
    yield
    del SAE_CLASS_REGISTRY[OWN], SAE_TRAINING_CLASS_REGISTRY[OWN]


@pytest.mark.parametrize("architecture", FIELDS)
def test_a_name_gives_its_training_class_and_config(architecture: str, outcome: Outcome) -> None:
    cls, cfg = get_sae_training_class(architecture)
    assert issubclass(cls, TrainingSAE) and issubclass(cfg, TrainingSAEConfig)
    assert cfg.architecture() == architecture
    assert TrainingSAE.get_sae_class_for_architecture(architecture) is cls
    assert TrainingSAE.get_sae_config_class_for_architecture(architecture) is cfg


def test_inference_classes_are_saelens_own(outcome: Outcome) -> None:
    found = {name: [c.__module__ + "." + c.__qualname__ for c in get_sae_class(name)]
             for name in SAE_CLASS_REGISTRY}  # fmt: skip
    assert found["jumprelu"][0].startswith("sae_lens.")
    assert get_sae_class("jumprelu") == (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig)
    outcome.same("classes", found)


@pytest.mark.parametrize("architecture", FIELDS)
def test_a_name_is_registered_once(architecture: str) -> None:
    entry = get_sae_training_class(architecture)
    with pytest.raises(ValueError, match="already registered"):
        register_sae_training_class(architecture, *entry)
    with pytest.raises(ValueError, match="already registered"):
        register_sae_class("jumprelu", *get_sae_class("jumprelu"))
    assert get_sae_training_class(architecture) == entry


def test_an_unknown_name_is_a_key_error() -> None:
    for get in (get_sae_class, get_sae_training_class):
        with pytest.raises(KeyError, match="no_such"):
            get("no_such")


def test_one_s_own_architecture_trains_saves_and_loads(
    own: None, outcome: Outcome, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cfg = HalvedConfig(d_in=D_MODEL, d_sae=D_SAE, factor=0.37, l1_coefficient=0.1)
    assert TrainingSAEConfig.from_dict(cfg.to_dict()) == cfg
    sae = TrainingSAE.from_dict(cfg.to_dict())
    assert type(sae) is Halved
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=5 * BATCH, train_batch_size_samples=BATCH, lr_end=3e-5
        ),
        sae=sae,
        data_provider=iter(torch.randn(7, BATCH, D_MODEL)),
    )
    trained = trainer.fit()
    outcome.same("weights", weights(trained))
    folder = tmp_path_factory.mktemp("own")
    trained.save_inference_model(str(folder))
    loaded = SAE.load_from_disk(folder)
    assert type(loaded) is StandardSAE
    torch.testing.assert_close(loaded.W_dec, trained.W_dec, rtol=0, atol=0)
