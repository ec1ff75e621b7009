"""What is saved: a stock folder that needs no plugin, and a checkpoint that loses nothing.

Inference folders are read back by a process that never imports this package.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

D_IN, D_SAE, BATCH = 19, 53, 67
# Every way a parameter can be stored, with λ fixed and steered.
KINDS = {
    f"{unit}-{theta}-{rows}-{'steered' if steered else 'fixed'}": (unit, theta, rows, steered)
    for unit, theta, rows, steered in product(
        ("sqrt_d", "unit_rms"), ("raw", "log"), ("free", "unit_norm"), (True, False)
    )
}


def config(kind: str, **fields: Any) -> JumpReLUTrainingSAEConfig:
    unit, theta, rows, steered = KINDS[kind]
    start: dict[str, Any] = {"target_l0": 5}
    if not steered:
        scale = 1.0 if unit == "unit_rms" else D_IN**0.5
        start = {
            "l0_coefficient": 0.003 * scale**2,
            "jumprelu_init_threshold": 0.1 * scale,
            "jumprelu_bandwidth": 0.1 * scale,
        }
    return JumpReLUTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        hyperparameter_units=unit,  # type: ignore[arg-type]
        log_threshold=theta == "log",  # type: ignore[arg-type]
        unit_norm_decoder=rows == "unit_norm",  # type: ignore[arg-type]
        step_kernel="sparse",
        decoder_init_norm=1.0,
        **{**start, **fields},
    )


def batches(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    mixing = torch.randn(D_IN, D_IN, generator=g)
    return [0.7 + torch.randn(BATCH, D_IN, generator=g) @ mixing for _ in range(count)]


def endless() -> Iterator[Tensor]:
    while True:
        yield from batches(11)


def trainer_for(sae: JumpReLUTrainingSAE, steps: int) -> SAETrainer[Any, Any]:
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=5e-3,
            lr_end=5e-4,
            n_batches_for_norm_estimate=11,
        ),
        sae=sae,
        data_provider=endless(),
    )


def trained(kind: str, steps: int = 5, **fields: Any) -> JumpReLUTrainingSAE:
    torch.manual_seed(5)
    sae = JumpReLUTrainingSAE(config(kind, **fields))
    start = {name: value.clone() for name, value in sae.state_dict().items()}
    trainer_for(sae, steps).fit()
    assert any(not torch.equal(v, start.get(n, v)) for n, v in sae.state_dict().items())
    return sae


# ---------------------------------------------------------------- inference folders

READER = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
root = Path(sys.argv[1])
x = load_file(root / "x.safetensors")["x"]
out = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    sae = SAE.load_from_disk(folder)
    out[folder.name + "/class"] = x.new_tensor(float(type(sae).__name__ == "JumpReLUSAE"))
    out[folder.name + "/acts"] = sae.encode(x).detach().contiguous()
    out[folder.name + "/x_hat"] = sae(x).detach().contiguous()
assert not [m for m in sys.modules if m.startswith("jumprelu_plugin")]
save_file(out, root / "read.safetensors")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, JumpReLUTrainingSAE]]:
    """A folder of inference folders, one for each kind, and what saved them."""
    root = tmp_path_factory.mktemp("saved")
    saes = {kind: trained(kind) for kind in KINDS}
    # One as it stands in the middle of training: not folded, parametrized, layer-normed.
    middle = "unit_rms-log-unit_norm-steered"
    saes["unfolded"] = trained(middle, normalize_activations="layer_norm")
    for name, sae in saes.items():
        sae.save_inference_model(root / name)
    save_file({"x": batches(3)[2]}, root / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(root)],
        capture_output=True,
        text=True,
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return root, saes


@pytest.mark.parametrize("name", [*KINDS, "unfolded"])
def test_stock_reads_the_same_sae(
    saved: tuple[Path, dict[str, JumpReLUTrainingSAE]], name: str
) -> None:
    root, saes = saved
    read = load_file(root / "read.safetensors")
    x = load_file(root / "x.safetensors")["x"]
    sae = saes[name].eval()
    acts = sae.encode(x).detach()
    assert read[f"{name}/class"] == 1
    assert 0 < (acts > 0).float().mean() < 0.8
    assert torch.equal(read[f"{name}/acts"] > 0, acts > 0)
    torch.testing.assert_close(read[f"{name}/acts"], acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[f"{name}/x_hat"], sae(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, "unfolded"])
def test_the_folder_is_a_stock_jumprelu_folder(
    saved: tuple[Path, dict[str, JumpReLUTrainingSAE]], name: str
) -> None:
    folder = saved[0] / name
    cfg = json.loads((folder / SAE_CFG_FILENAME).read_text())
    assert cfg["architecture"] == "jumprelu"
    assert sorted(p.name for p in folder.iterdir()) == [SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME]
    shapes = {n: tuple(v.shape) for n, v in load_file(folder / SAE_WEIGHTS_FILENAME).items()}
    assert shapes == {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
        "threshold": (D_SAE,),
    }


# ---------------------------------------------------------------- checkpoints


def mid_training(kind: str, steps: int = 4) -> tuple[JumpReLUTrainingSAE, SAETrainer[Any, Any]]:
    torch.manual_seed(5)
    sae = JumpReLUTrainingSAE(config(kind, normalize_activations="none"))
    trainer = trainer_for(sae, 9)
    for _ in range(steps):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    return sae, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_restores_everything(kind: str, tmp_path: Path) -> None:
    sae, _ = mid_training(kind)
    sae.save_model(tmp_path)
    torch.manual_seed(99)
    restored = JumpReLUTrainingSAE(config(kind, normalize_activations="none"))
    restored.load_weights_from_checkpoint(tmp_path)
    assert restored.bandwidth == sae.bandwidth
    assert (restored.control.l0 is None) == (sae.control.l0 is None) == ("fixed" in kind)
    if sae.control.l0 is not None and restored.control.l0 is not None:
        assert restored.control.l0.state() == sae.control.l0.state()
        assert restored.control.l0.penalty != 0 and restored.control.l0.steps > 0
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(restored, name), getattr(sae, name)), name
    for (name, found), (_, expected) in zip(
        restored.named_parameters(), sae.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    sae, trainer = mid_training(kind)
    trainer.save_checkpoint("here", base_path=tmp_path)
    torch.manual_seed(99)
    resumed = JumpReLUTrainingSAE(config(kind, normalize_activations="none"))
    again = trainer_for(resumed, 9)
    resumed.load_weights_from_checkpoint(tmp_path / "here")
    again.load_trainer_state(tmp_path / "here")
    for _ in range(4):
        next(again.data_provider)
    trainer.fit()
    again.fit()
    assert again.n_training_steps == trainer.n_training_steps == 9
    for (name, found), (_, expected) in zip(
        resumed.state_dict().items(), sae.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_starts_from_the_saved_sae(kind: str, tmp_path: Path) -> None:
    """`from_pretrained_path` loads with `TrainingSAE.load_from_disk` and trains on."""
    sae, _ = mid_training(kind)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, JumpReLUTrainingSAE)
    assert loaded.cfg == sae.cfg or loaded.cfg.to_dict() == sae.cfg.to_dict()
    before = {name: value.clone() for name, value in parameters_of(loaded).items()}
    for name, value in parameters_of(sae).items():
        torch.testing.assert_close(before[name], value, rtol=1e-6, atol=0.0)
    trainer = trainer_for(loaded, 1)
    trainer.step(next(trainer.data_provider))
    for name, value in parameters_of(loaded).items():
        # One step of Adam moves a stored parameter by its learning rate, 5e-3, whatever its units;
        # a scaled or log parameter shows that times the units or times θ.
        change = value - before[name]
        allowed = 0.05 + (5.1e-3 * loaded.units.activation if name != "W_enc" else 0.0)
        if name == "threshold" and loaded.control.l0 is not None:
            # A steered run also shifts all thresholds together, by up to gain · ε/2.
            assert loaded.bandwidth is not None
            allowed += loaded.control.l0.gain * loaded.bandwidth / 2
        assert change.abs().max() < allowed, name


def parameters_of(sae: JumpReLUTrainingSAE) -> dict[str, Tensor]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    return {name: getattr(sae, name).detach() for name in names}


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "expected_average_only_in"])
def test_a_copy_trains_apart_from_its_original(normalization: Any) -> None:
    """SAELens' normalization functions are closures over the SAE they were made for."""
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, target_l0=5, normalize_activations=normalization
        )
    )
    x = 3 * torch.randn(101, D_IN) + 1
    other = copy.deepcopy(sae)
    found = [
        a_copy.training_forward_pass(TrainStepInput(x, {"l0": 1.0}, None, 0, False)).loss
        for a_copy in (other, copy.deepcopy(sae))
    ]
    found[0].backward()  # type: ignore[union-attr]
    assert torch.equal(found[0], found[1])
    assert other.bandwidth is not None and sae.bandwidth is None
    assert all(parameter.grad is None for parameter in sae.parameters())
