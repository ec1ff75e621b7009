"""A saved transcoder is stock SAELens', and a resumed training the same training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from tests.saes.transcoders import D_IN, D_OUT, D_SAE, batches, make, trainer_for

KINDS = {
    f"{unit}-{theta}-{rows}-{'skip' if skip else 'plain'}": (unit, theta, rows, skip)
    for unit, theta, rows, skip in product(
        ("sqrt_d", "unit_rms"), ("raw", "log"), ("free", "unit_norm"), (False, True)
    )
}


def of_kind(kind: str, **fields: Any) -> JumpReLUTrainingTranscoder:
    unit, theta, rows, skip = KINDS[kind]
    torch.manual_seed(5)
    return make(
        skip,
        hyperparameter_units=unit,
        log_threshold=theta == "log",
        unit_norm_decoder=rows == "unit_norm",
        decoder_init_norm=1.0,
        step_kernel="sparse",
        **fields,
    )


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
    expected = "JumpReLUSkipTranscoder" if folder.name.endswith("skip") else "JumpReLUTranscoder"
    assert type(sae).__name__ == expected, type(sae)
    assert sae.cfg.metadata.hook_name_out == "blocks.7.hook_mlp_out"
    out[folder.name + "/acts"] = sae.encode(x).detach().contiguous()
    out[folder.name + "/y_hat"] = sae(x).detach().contiguous()
assert not [m for m in sys.modules if m.startswith("jumprelu_plugin")]
save_file(out, root / "read.safetensors")
"""


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, JumpReLUTrainingTranscoder]]:
    root = tmp_path_factory.mktemp("saved")
    saes = {kind: of_kind(kind, hook_name_out="blocks.7.hook_mlp_out") for kind in KINDS}
    for name, sae in saes.items():
        trainer_for(sae, 5, scale_in=3.1, scale_out=0.2).fit()
        sae.save_inference_model(root / name)
    save_file({"x": batches(3, scale_in=3.1)[2][:, :D_IN].contiguous()}, root / "x.safetensors")
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


@pytest.mark.parametrize("name", KINDS)
def test_stock_reads_the_same_transcoder(
    saved: tuple[Path, dict[str, JumpReLUTrainingTranscoder]], name: str
) -> None:
    root, saes = saved
    read, sae = load_file(root / "read.safetensors"), saes[name].eval()
    x = load_file(root / "x.safetensors")["x"]
    acts = sae.encode(x).detach()
    assert 0 < (acts > 0).float().mean() < 0.8
    assert torch.equal(read[f"{name}/acts"] > 0, acts > 0)
    torch.testing.assert_close(read[f"{name}/acts"], acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[f"{name}/y_hat"], sae(x).detach(), rtol=1e-5, atol=1e-6)
    folder = root / name
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == sae.cfg.architecture()
    assert cfg["d_out"] == D_OUT and cfg["normalize_activations"] == "none"
    shapes = {n: tuple(v.shape) for n, v in load_file(folder / "sae_weights.safetensors").items()}
    expected = {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_OUT),
        "b_dec": (D_OUT,),
        "threshold": (D_SAE,),
    }
    assert shapes == {**expected, **({"W_skip": (D_OUT, D_IN)} if "skip" in name else {})}


def mid_training(kind: str) -> tuple[JumpReLUTrainingTranscoder, SAETrainer[Any, Any]]:
    sae = of_kind(kind)
    trainer = trainer_for(sae, 9)
    trainer.activation_scaler.estimate_scaling_factor(D_IN, trainer.data_provider, 11)
    for _ in range(4):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    return sae, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    sae, trainer = mid_training(kind)
    trainer.save_checkpoint("here", base_path=tmp_path)
    resumed = of_kind(kind)
    again = trainer_for(resumed, 9)
    resumed.load_weights_from_checkpoint(tmp_path / "here")
    again.load_trainer_state(tmp_path / "here")
    assert again.activation_scaler.scaling_factor == trainer.activation_scaler.scaling_factor
    for _ in range(4):
        next(again.data_provider)
    trainer.fit()
    again.fit()
    assert again.n_training_steps == trainer.n_training_steps == 9
    for (name, found), (_, expected) in zip(
        resumed.state_dict().items(), sae.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_fine_tuning_keeps_loaded_weights(tmp_path: Path) -> None:
    sae, _ = mid_training("sqrt_d-raw-unit_norm-skip")
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, JumpReLUTrainingSkipTranscoder)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    trainer = trainer_for(loaded, 1)
    trainer.step(next(trainer.data_provider))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        change = (loaded.state_dict()[name] - before[name]).abs().max()
        assert 0 < change < 0.01, name  # one step of Adam at 5e-3, renormalised


@pytest.mark.parametrize("kind", ["sqrt_d-raw-unit_norm-plain", "unit_rms-log-free-skip"])
def test_an_unfolded_transcoder_is_not_saved_for_use(kind: str, tmp_path: Path) -> None:
    sae, trainer = mid_training(kind)
    with pytest.raises(ValueError, match=r"expect scaled inputs.*activation_scaler\.json"):
        sae.save_inference_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What the message says to do.
    trainer.save_checkpoint("here", base_path=tmp_path)
    scales = json.loads((tmp_path / "here" / "activation_scaler.json").read_text())
    sae.fold_activation_norm_scaling_factor(tuple(scales["scaling_factor"]))
    sae.save_inference_model(tmp_path / "out")
