"""The folder of a cross-layer transcoder: what is read back and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jumprelu_plugin.transcoders.clt import load_clt, save_clt
from tests.transcoders.clt.random_clt import D_OUT, D_SAE, random_clt

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = random_clt(model_name="some-model")
    loaded = load_clt(save_clt(model, tmp_path))
    assert loaded.cfg == model.cfg
    for (name, value), (_, expected) in zip(
        loaded.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


def spoil(folder: Path, **changes: Any) -> None:
    path = folder / "layer_1.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"W_dec": torch.zeros(D_SAE, 3, D_OUT)},
            r"W_dec is \(53, 3, 11\), expected \(53, 2, 11\)",
        ),
        ({"b_enc": None}, "b_enc is missing"),
        ({"W_skip": torch.zeros(2, 2)}, r"W_skip is \(2, 2\), expected none"),
        ({"threshold": torch.full((D_SAE,), -0.1)}, "thresholds are negative"),
        ({"b_enc": torch.full((D_SAE,), torch.nan)}, "b_enc holds NaN"),
    ],
)
def test_broken_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_clt(random_clt(), tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_clt(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cross-layer transcoder"):
        load_clt(tmp_path)
    save_clt(random_clt(), tmp_path)
    (tmp_path / "layer_2.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="layer_2.safetensors is not a safetensors file"):
        load_clt(tmp_path)
    (tmp_path / "layer_2.safetensors").unlink()
    with pytest.raises(ValueError, match="layer_2.safetensors is missing"):
        load_clt(tmp_path)
    config = json.loads((tmp_path / "cross_layer.json").read_text())
    (tmp_path / "cross_layer.json").write_text(json.dumps({**config, "layers": [0, 2, 3]}))
    with pytest.raises(ValueError, match="cannot be read: layers are 0, 2, 3"):
        load_clt(tmp_path)
