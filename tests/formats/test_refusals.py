"""Dictionaries and archives that a format cannot take are refused by name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import save_file

from jumprelu_plugin.formats import export, load_dictionary
from jumprelu_plugin.saes.parameters import Parameters
from tests.dictionaries import D_IN, D_OUT, D_SAE, random_sae, random_transcoder, saved
from tests.formats.outputs import INPUTS, same_outputs


def test_unfolded_checkpoint_is_refused_or_folded(tmp_path: Path) -> None:
    sae = random_sae()
    sae.cfg.normalize_activations = "expected_average_only_in"
    folder = saved(sae, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="expected_average_only_in"):
        export(folder, "gemma-scope", tmp_path / "out")
    scaler = folder / "activation_scaler.json"
    scaler.write_text(json.dumps({"scaling_factor": 0.37, "has_whitening": False}))
    with pytest.raises(ValueError, match="0.37.*--fold_scale"):
        export(folder, "gemma-scope", tmp_path / "out")
    export(folder, "saelens", tmp_path / "out", fold_scale=True)
    sae.fold_activation_norm_scaling_factor(0.37)
    same_outputs(SAE.load_from_disk(tmp_path / "out")(INPUTS), sae(INPUTS))
    # A finished run leaves an empty scaler beside its last checkpoint.
    scaler.write_text(json.dumps({"scaling_factor": None, "has_whitening": False}))
    saved(sae, folder)
    export(folder, "gemma-scope", tmp_path / "gs")
    scaler.write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    with pytest.raises(ValueError, match="whitened"):
        export(folder, "gemma-scope", tmp_path / "gs", fold_scale=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are Unix's")
def test_weights_that_are_a_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    (folder / "sae_weights.safetensors").unlink()
    os.mkfifo(folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="sae_weights.safetensors is a device or pipe"):
        load_dictionary(folder)


def test_transcoder_checkpoint_folds_two_scales(tmp_path: Path) -> None:
    sae = random_transcoder(skip=True, d_out=D_OUT)
    folder = saved(sae, tmp_path / "checkpoint")
    scaler = folder / "activation_scaler.json"
    scaler.write_text('{"scaling_factor": 0.37}')
    with pytest.raises(ValueError, match=r"2 scale\(s\).*holds 0.37"):
        export(folder, "saelens", tmp_path / "out", fold_scale=True)
    scaler.write_text('{"scaling_factor": [0.37, 2.9]}')
    with pytest.raises(ValueError, match="--fold_scale"):
        export(folder, "saelens", tmp_path / "out")
    export(folder, "saelens", tmp_path / "out", fold_scale=True)
    same_outputs(SAE.load_from_disk(tmp_path / "out")(INPUTS), sae(0.37 * INPUTS) / 2.9)


def test_per_token_normalisation_and_other_architectures_are_refused(tmp_path: Path) -> None:
    sae = random_sae()
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="layer_norm"):
        export(saved(sae, tmp_path / "norm"), "saelens", tmp_path / "out")
    relu = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(ValueError, match="'standard'.*only JumpReLU"):
        export(saved(relu, tmp_path / "relu"), "saelens", tmp_path / "out")


def test_negative_thresholds_are_refused(tmp_path: Path) -> None:
    sae = random_transcoder()
    sae.threshold.data[5] = -0.25
    with pytest.raises(ValueError, match=r"1 of 67 thresholds.*clamp_"):
        export(saved(sae, tmp_path / "set" / "layer_2"), "saelens", tmp_path / "out")


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([random_transcoder(0), random_transcoder(1, d_sae=71)], {"n_layers": 2}, "different wid"),
        (
            [random_transcoder(0), random_transcoder(1, model="google/gemma-2-2b-it")],
            {"n_layers": 2},
            "different models .*layer 1: google/gemma-2-2b-it",
        ),
        ([random_transcoder(0), random_transcoder(2)], {"n_layers": 3}, r"layers \[1\] of 3"),
        ([random_transcoder(0), random_transcoder(1)], {"n_layers": 3}, "--pad_missing"),
        ([random_transcoder(0), random_transcoder(1)], {"n_layers": 1}, r"transcoders of \[1\]"),
        ([random_transcoder(0)], {}, "--n_layers"),
        ([random_transcoder(0, hook_in="hook_resid_pre")], {"n_layers": 1}, "replaces MLPs"),
        ([random_transcoder(0, hook_out="hook_attn_out")], {"n_layers": 1}, "replaces MLPs"),
        ([random_sae("blocks.0.hook_resid_post")], {"n_layers": 1}, "replaces MLPs"),
        ([random_transcoder(0, d_out=D_OUT)], {"n_layers": 1}, "residual stream's width"),
        (
            [random_transcoder(0), random_transcoder(1, hook_in="hook_resid_mid")],
            {"n_layers": 2},
            "different hooks",
        ),
    ],
)
def test_sets_that_circuit_tracer_cannot_take(layers, options, message, tmp_path: Path) -> None:
    for sae in layers:
        layer = sae.cfg.metadata.hook_name.split(".")[1]
        saved(sae, tmp_path / "set" / f"layer_{layer}")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "set", "circuit-tracer", tmp_path / "out", unchecked=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_layers_is_no_dictionary(tmp_path: Path) -> None:
    one = saved(random_transcoder(3), tmp_path / "set" / "layer_3")
    (tmp_path / "clt").mkdir()
    (tmp_path / "clt" / "cross_layer.json").write_text("{}")
    for name, advice in (("set", f"give one of them, such as {one}"), ("clt", "cross-layer")):
        with pytest.raises(ValueError, match=f"holds no dictionary.*{advice}") as plain:
            load_dictionary(tmp_path / name)
        assert "--to" not in str(plain.value)  # a flag of `jumprelu export` alone
        with pytest.raises(ValueError, match=f"{advice}.*For all layers at once.*circuit-tracer"):
            export(tmp_path / name, "gemma-scope", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no dictionary") as nothing:
        export(tmp_path / "nowhere", "gemma-scope", tmp_path / "out")
    assert "circuit-tracer" not in str(nothing.value)


def test_set_folders_that_are_not_what_they_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no transcoders"):
        export(tmp_path, "circuit-tracer", tmp_path / "out", unchecked=True)
    saved(random_transcoder(4), tmp_path / "set" / "layer_1")
    with pytest.raises(ValueError, match="another layer"):
        export(tmp_path / "set", "circuit-tracer", tmp_path / "out", n_layers=2, unchecked=True)


@pytest.mark.parametrize(
    ("target", "sae", "message"),
    [
        ("gemma-scope", random_sae("blocks.2.hook_resid_pre"), "cannot name"),
        ("gemma-scope", random_transcoder(hook_in="hook_resid_mid"), "transcoders read"),
        ("gemma-scope", random_transcoder(skip=True), "gemma-scope-2"),
        ("gemma-scope", random_sae("hook_embed"), "not inside a block"),
        ("gemma-scope-2", random_sae("blocks.2.hook_resid_pre"), "no such name"),
        ("gemma-scope-2", random_sae("blocks.2.hook_resid_mid"), "holds SAEs of"),
        ("dictionary-learning", random_transcoder(), "no JumpReLU transcoder"),
        ("dictionary-learning", random_sae("blocks.2.attn.hook_z"), "not 'attn.hook_z'"),
        ("neuronpedia", random_transcoder(skip=True), "refuses"),
    ],
)
def test_hooks_and_kinds_a_target_cannot_take(target, sae, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(saved(sae, tmp_path / "sae"), target, tmp_path / "out", unchecked=True)
    assert not (tmp_path / "out").exists()


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_archives_that_unpickle_are_refused(tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "npz"
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="unpickling runs code"):
        load_dictionary(folder)
    (folder / "params.npz").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="unpickling runs code"):
        load_dictionary(folder)
    folder = tmp_path / "pt"
    folder.mkdir()
    torch.save({"W_enc": Bomb(mark)}, folder / "ae.pt")
    (folder / "config.json").write_text('{"trainer": {"dict_class": "JumpReluAutoEncoder"}}')
    with pytest.raises(ValueError, match="unpickling runs code"):
        load_dictionary(folder)
    assert not mark.exists()


def test_wrong_keys_and_shapes_are_refused(tmp_path: Path) -> None:
    tensors = Parameters.of(random_sae(subtract=False)).tensors()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    npz = tmp_path / "params.npz"
    np.savez(npz, **{key: value for key, value in arrays.items() if key != "threshold"})
    with pytest.raises(ValueError, match="expected.*threshold"):
        load_dictionary(tmp_path)
    np.savez(npz, **{**arrays, "W_enc": arrays["W_enc"].T})
    with pytest.raises(ValueError, match=r"b_enc has shape \(67,\)"):
        load_dictionary(tmp_path)
    np.savez(npz, **arrays)
    with pytest.raises(ValueError, match="--hook_name"):
        export(tmp_path, "gemma-scope", tmp_path / "out")
    npz.unlink()
    save_file({"w_enc": tensors["W_enc"]}, tmp_path / "params.safetensors")
    with pytest.raises(ValueError, match="no config.json"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "topk"}')
    with pytest.raises(ValueError, match="'topk'"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "jump_relu"}')
    with pytest.raises(ValueError, match="expected"):
        load_dictionary(tmp_path)
    (tmp_path / "params.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_dictionary(tmp_path)
    with pytest.raises(ValueError, match="holds no dictionary"):
        load_dictionary(tmp_path / "nowhere")
    folder = saved(random_sae(), tmp_path / "cut")
    (folder / "sae_weights.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="SAELens cannot load"):
        load_dictionary(folder)
