"""Gemma Scope's files read as SAELens' own loaders read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders

from jumprelu_plugin.formats import export, load_dictionary
from jumprelu_plugin.formats.saelens_loaders import hub_files_from
from tests.dictionaries import D_IN, D_SAE, random_sae

EMBEDDING = "embedding/width_4k/average_l0_6"


def npz(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tensors = random_sae().state_dict()
    np.savez(folder / "params.npz", **{key: value.numpy() for key, value in tensors.items()})
    return folder


@pytest.mark.parametrize("hook_name", ["hook_embed", None])
def test_embedding_sae_is_what_saelens_loader_makes(hook_name: str | None, tmp_path: Path) -> None:
    folder = npz(tmp_path / (EMBEDDING if hook_name is None else "elsewhere"))
    with hub_files_from(folder):
        cfg, wanted, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res",
            EMBEDDING,
            cfg_overrides={"d_in": D_IN, "d_sae": D_SAE},
        )
    found = load_dictionary(folder, hook_name=hook_name)
    assert found.hook_name == cfg["hook_name"] == "hook_embed"
    assert found.parameters.subtracts_b_dec is cfg["apply_b_dec_to_input"] is False
    tensors = found.parameters.tensors()
    assert sorted(tensors) == sorted(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-6, atol=0)


def test_embedding_sae_becomes_the_stock_sae(tmp_path: Path) -> None:
    export(npz(tmp_path / EMBEDDING), "saelens", tmp_path / "out")
    found = load_dictionary(tmp_path / "out")
    assert found.hook_name == "hook_embed"
    raw = random_sae().W_dec
    torch.testing.assert_close(found.parameters.W_dec, raw * D_IN**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", None])
def test_other_saes_keep_their_scale(hook_name: str | None, tmp_path: Path) -> None:
    folder = npz(tmp_path / "layer_0")
    found = load_dictionary(folder, hook_name=hook_name)
    assert torch.equal(found.parameters.W_dec, random_sae().W_dec)
