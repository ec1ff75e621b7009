"""Runs on a GPU, and what they leave for another start: here the sums of a step are added in any
order, so a resumed run is close to the uninterrupted one and not the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.checkpoint import TENSORS_FILENAME
from tests.tiny import D_MODEL
from tests.training.runs import BATCH, D_SAE, config, run, steps_logged, token_rows

pytestmark = pytest.mark.gpu
STEPS = 90


@pytest.fixture
def model_on_gpu(model: Any) -> Iterator[Any]:
    yield model.to("cuda")
    model.to("cpu")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.05 * value.norm() + 1e-3, name


@pytest.mark.parametrize("path", ["sparse", "screened", "triton", "dense", "auto"])
def test_a_resumed_run_goes_on(model_on_gpu: Any, tmp_path: Path, path: Any) -> None:
    sae = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, target_l0=3, step_kernel=path, max_latent_density=0.12
    )
    fields: dict[str, Any] = {"sae": sae, "device": "cuda", "training_tokens": STEPS * BATCH}
    cfg = config(tmp_path, n_checkpoints=2, **fields)
    whole = run(model_on_gpu, cfg, token_rows())
    checkpoint, _ = sorted(Path(cfg.checkpoint_path or "").iterdir(), key=lambda p: int(p.name))
    assert (checkpoint / TENSORS_FILENAME).is_file()
    again = config(tmp_path / "again", resume_from_checkpoint=str(checkpoint), **fields)
    resumed = run(model_on_gpu, again, token_rows())
    step = int(checkpoint.name) // BATCH
    assert steps_logged(tmp_path / "again" / "output") == list(range(step, STEPS))
    assert_close(resumed.sae.state_dict(), whole.sae.state_dict())
    saved = SAE.load_from_disk(str(tmp_path / "again" / "output"), device="cuda")
    assert saved.W_dec.device.type == "cuda" and saved.cfg.d_sae == D_SAE
