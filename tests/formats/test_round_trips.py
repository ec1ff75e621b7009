"""Every format is written, read by its tool's own loader, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.torch import load_file

from jumprelu_plugin import formats as exports
from jumprelu_plugin.formats import circuit_tracer, export, load_dictionary
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from tests.dictionaries import (
    D_IN,
    D_OUT,
    D_SAE,
    NORMED,
    needs,
    random_sae,
    random_transcoder,
    saved,
)
from tests.families import D, model_folder, plain_model
from tests.formats.outputs import INPUTS, same_outputs

SINGLE = {
    "saelens": [random_sae(), random_transcoder(d_out=D_OUT), random_transcoder(skip=True)],
    "gemma-scope": [
        random_sae(),
        random_sae("blocks.3.attn.hook_z"),
        random_sae("blocks.0.hook_mlp_out", subtract=False),
        random_transcoder(),
    ],
    "gemma-scope-2": [
        random_sae(),
        random_transcoder(hook_in="mlp.hook_in", d_out=D_OUT),
        random_transcoder(hook_in="hook_resid_mid", skip=True, d_out=D_OUT),
    ],
    "dictionary-learning": [random_sae(), random_sae("blocks.1.hook_mlp_out", subtract=False)],
    "neuronpedia": [random_sae(), random_transcoder(hook_in="hook_resid_mid")],
}
CASES = [(target, sae) for target, saes in SINGLE.items() for sae in saes]


@pytest.mark.parametrize(
    ("target", "sae"), CASES, ids=[f"{t}-{s.cfg.metadata.hook_name}" for t, s in CASES]
)
def test_round_trip(target: str, sae: SAE, tmp_path: Path) -> None:
    needs(exports.TARGETS[target].loader.module)
    written = tmp_path / "out" / "there"
    check = export(saved(sae, tmp_path / "sae"), target, written)
    assert check is not None and check.error < 1e-5 and check.active > 3 and check.inputs > 30
    # Back again, through this package's reader and SAELens' folder, to a stock object.
    gemma = {"hook_name": sae.cfg.metadata.hook_name, "model_name": "gemma-2-2b"}
    if sae.cfg.metadata.hook_name_out:
        gemma["hook_name_out"] = sae.cfg.metadata.hook_name_out
    export(written, "saelens", tmp_path / "back", **(gemma if target == "gemma-scope" else {}))
    back = SAE.load_from_disk(tmp_path / "back")
    assert back.cfg.architecture() == sae.cfg.architecture()
    assert back.cfg.metadata.hook_name == sae.cfg.metadata.hook_name
    assert back.cfg.metadata.hook_name_out == sae.cfg.metadata.hook_name_out
    assert back.cfg.metadata.model_name == "gemma-2-2b"
    for each in (sae, back):
        if hasattr(each, "turn_off_forward_pass_hook_z_reshaping"):
            each.turn_off_forward_pass_hook_z_reshaping()
    same_outputs(back(INPUTS), sae(INPUTS))
    record = json.loads((written / "export.json").read_text())
    assert record["target"] == target and record["check"]["error"] == check.error


def test_gemma_scope_is_the_papers_layout(tmp_path: Path) -> None:
    """By hand, from the arrays alone, as DeepMind's tutorial computes an SAE."""
    sae = random_sae()
    export(saved(sae, tmp_path / "sae"), "gemma-scope", tmp_path / "out")
    with np.load(tmp_path / "out" / "params.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
        assert arrays["W_enc"].shape == (D_IN, D_SAE) and arrays["W_enc"].dtype == np.float32
        z = INPUTS.numpy() @ arrays["W_enc"] + arrays["b_enc"]
        f = np.maximum(z, 0) * (z > arrays["threshold"])
        x_hat = f @ arrays["W_dec"] + arrays["b_dec"]
    same_outputs(torch.from_numpy(x_hat), sae(INPUTS))


def test_gemma_scope_2_files(tmp_path: Path) -> None:
    transcoder = random_transcoder(hook_in="hook_resid_mid", skip=True, d_out=D_OUT)
    export(saved(transcoder, tmp_path / "t"), "gemma-scope-2", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "params.safetensors")
    assert tensors["w_enc"].shape == (D_IN, D_SAE)
    assert torch.equal(tensors["affine_skip_connection"], transcoder.W_skip.T)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "jump_relu" and config["affine_connection"] is True
    assert config["hf_hook_point_in"] == "model.layers.2.pre_feedforward_layernorm.input"
    assert config["hf_hook_point_out"] == "model.layers.2.post_feedforward_layernorm.output"


def test_fold_gain_makes_it_a_transcoder_of_the_gained_norm(tmp_path: Path) -> None:
    transcoder = random_transcoder(3, d_in=256, d_out=256, model=EMBEDDED_MODEL)
    folder = saved(transcoder, tmp_path / "t")
    with pytest.raises(ValueError, match="fold_gain"):
        export(folder, "gemma-scope-2", tmp_path / "out")
    export(folder, "gemma-scope-2", tmp_path / "out", fold_gain=True)
    model = load_model(EMBEDDED_MODEL, "AutoModelForCausalLM")
    gained: list[torch.Tensor] = []
    norm = model.model.layers[3].pre_feedforward_layernorm
    norm.register_forward_hook(lambda module, args, out: gained.extend((args[0], out)))
    model(torch.arange(5, 24).reshape(1, -1))
    residual, gained_norm = gained
    plain = residual / (residual.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = load_dictionary(tmp_path / "out").as_sae()
    assert (got.encode(gained_norm) > 0).any()
    same_outputs(got(gained_norm)[0], transcoder(plain)[0])


@pytest.mark.parametrize("recorded", [None, "SAETransformerBridge"])
def test_fold_gain_takes_models_that_only_a_bridge_loads(
    recorded: str | None, tmp_path: Path
) -> None:
    folder = model_folder("gemma3", tmp_path / "model")
    plain = plain_model("gemma3")
    norm = plain.model.layers[1].pre_feedforward_layernorm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.7, 0.9, D))
    plain.save_pretrained(folder)
    transcoder = random_transcoder(1, d_in=D, d_out=D, model=str(folder))
    transcoder.cfg.metadata.model_class_name = recorded
    export(saved(transcoder, tmp_path / "t"), "gemma-scope-2", tmp_path / "out", fold_gain=True)
    got = load_dictionary(tmp_path / "out").as_sae()
    x = torch.randn(53, D, generator=torch.Generator().manual_seed(7))
    gain = torch.linspace(0.3, 1.9, D)
    same_outputs(got(x * gain), transcoder(x))


def test_fold_gain_refuses_a_norm_that_centers(tmp_path: Path) -> None:
    folder = model_folder("gpt2", tmp_path / "model")
    transcoder = random_transcoder(1, d_in=D, d_out=D, model=str(folder))
    with pytest.raises(ValueError, match="subtracts the mean"):
        export(saved(transcoder, tmp_path / "t"), "gemma-scope-2", tmp_path / "o", fold_gain=True)
    # With a bias, as pretrained GPT-2 has, its output is not 0 where all inputs are the same.
    plain = plain_model("gpt2")
    with torch.no_grad():
        plain.transformer.h[1].ln_2.bias.copy_(torch.linspace(-0.3, 0.4, D))
    plain.save_pretrained(folder)
    with pytest.raises(ValueError, match="subtracts the mean or adds a bias"):
        export(saved(transcoder, tmp_path / "u"), "gemma-scope-2", tmp_path / "o", fold_gain=True)


def test_gemma_scope_2_names_no_module_that_a_model_lacks(tmp_path: Path) -> None:
    folder = model_folder("gpt2", tmp_path / "model")
    made = random_transcoder(1, hook_in="mlp.hook_in", d_in=D, d_out=D, model=str(folder))
    with pytest.raises(ValueError, match="mlp.hook_in and hook_mlp_out by Gemma's .* is a gpt2"):
        export(saved(made, tmp_path / "t"), "gemma-scope-2", tmp_path / "out", unchecked=True)


def test_dictionary_learning_keeps_the_length_of_sequences(tmp_path: Path) -> None:
    export(saved(random_sae(), tmp_path / "sae"), "dictionary-learning", tmp_path / "out",
           unchecked=True)  # fmt: skip
    assert load_dictionary(tmp_path / "out").metadata == {"context_size": 37}
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for buffer, kept in ((None, {}), ({}, {}), ({"ctx_len": None}, {})):
        path.write_text(json.dumps({**config, "buffer": buffer}))
        assert load_dictionary(tmp_path / "out").metadata == kept
    for buffer in ({"ctx_len": "37"}, {"ctx_len": 0}, {"ctx_len": True}, [37]):
        path.write_text(json.dumps({**config, "buffer": buffer}))
        with pytest.raises(ValueError, match="expected an object whose ctx_len is a whole number"):
            load_dictionary(tmp_path / "out")


def test_neuronpedia_settings_are_its_runners_own(tmp_path: Path) -> None:
    needs("sae_dashboard")
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig

    export(saved(random_sae(), tmp_path / "sae"), "neuronpedia", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "neuronpedia_runner.json").read_text())
    config = NeuronpediaRunnerConfig(**settings, outputs_dir="x")
    assert config.from_local_sae and config.layer == 2 and config.n_tokens_in_prompt == 37
    sae = SAE.load_from_disk(tmp_path / "out")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert sae.cfg.metadata.neuronpedia_id == "gemma-2-2b/2-hook_resid_post-67"


@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_folder(skip: bool, tmp_path: Path) -> None:
    needs("circuit_tracer")
    saes = [random_transcoder(i, skip=skip and i == 1, seed=20 + i) for i in range(3)]
    for i, sae in enumerate(saes):
        saved(sae, tmp_path / "set" / f"layer_{i}")
    check = export(tmp_path / "set", "circuit-tracer", tmp_path / "out", n_layers=3, scan="mine")
    assert check is not None and check.error < 1e-5
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config == {
        "model_kind": "transcoder_set",
        "model_name": "gemma-2-2b",
        "feature_input_hook": NORMED,
        "feature_output_hook": "hook_mlp_out",
        "scan": "mine",
    }
    transcoders = circuit_tracer.load_transcoders(tmp_path / "out")
    assert transcoders.skip_connection is skip
    for i, sae in enumerate(saes):
        same_outputs(transcoders[i](INPUTS), sae(INPUTS))


def test_missing_layers_are_padded_with_dead_transcoders(tmp_path: Path) -> None:
    needs("circuit_tracer")
    saved(random_transcoder(1, skip=True), tmp_path / "set" / "layer_1")
    export(tmp_path / "set", "circuit-tracer", tmp_path / "out", n_layers=4, pad_missing=True)
    transcoders = circuit_tracer.load_transcoders(tmp_path / "out")
    assert len(transcoders) == 4
    for layer in (0, 2, 3):
        assert torch.equal(transcoders[layer](INPUTS), torch.zeros(len(INPUTS), D_IN))
        assert not transcoders[layer].encode(1e6 * INPUTS).any()
