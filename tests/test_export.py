"""Every format round-trips through its target's own loader, and what it cannot hold is refused.

Outputs are compared here once more against stock SAELens, apart from the comparison that `export`
itself makes; that comparison is shown to fail when a file is wrong.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dictionaries import (
    D_IN,
    D_OUT,
    D_SAE,
    NORMED,
    needs,
    random_sae,
    random_transcoder,
    saved,
)
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from jumprelu_plugin import formats as exports
from jumprelu_plugin.analysis.steering import Add, steer
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.formats import (
    circuit_tracer,
    export,
    load_dictionary,
    saelens,
)
from jumprelu_plugin.formats.checking import compare_dictionary
from jumprelu_plugin.formats.steering_vectors import compare_steered_logits
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.saes.parameters import Parameters

INPUTS = 2.0 * torch.randn(53, D_IN, generator=torch.Generator().manual_seed(13))


def same_outputs(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) < 1e-5


# ---------------------------------------------------------------- round trips

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


# ---------------------------------------------------------------- steering vectors


@pytest.mark.parametrize("target", ["lm-eval", "nnsight"])
@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out"])
def test_steering_vector(target: str, hook: str, tmp_path: Path) -> None:
    needs(exports.TARGETS[target].loader.module)
    sae = random_sae(f"blocks.3.{hook}", d_in=256, model=EMBEDDED_MODEL)
    amounts = {7: 3.0, 11: -1.5}
    check = export(saved(sae, tmp_path / "sae"), target, tmp_path / "out", amounts=amounts)
    assert check is not None and check.error < 1e-4
    module = "layers.3" if hook == "hook_resid_post" else "layers.3.post_feedforward_layernorm"
    want = 3.0 * sae.W_dec[7] - 1.5 * sae.W_dec[11]
    if target == "lm-eval":
        entry = torch.load(tmp_path / "out" / "steer.pt", weights_only=True)[module]
        assert entry["action"] == "add" and entry["bias"] is None and entry["head_index"] is None
        vector = entry["steering_vector"] * entry["steering_coefficient"]
    else:
        described = json.loads((tmp_path / "out" / "steer.json").read_text())
        assert described["module"] == f"model.{module}"
        vector = load_file(tmp_path / "out" / "steer.safetensors")["steering_vector"]
    torch.testing.assert_close(vector, want)


@pytest.mark.parametrize("factor", [1.0, 1.001, 0.0])
def test_steered_logits_are_compared_by_what_steering_changes(factor: float) -> None:
    dictionary = saelens.from_sae(
        random_sae("blocks.3.hook_resid_post", d_in=256, model=EMBEDDED_MODEL)
    )
    model = load_model(EMBEDDED_MODEL, "HookedTransformer")

    def steered(tokens: torch.Tensor) -> torch.Tensor:
        with steer(model, dictionary.as_sae(), Add(7, 3.0 * factor)):
            return model(tokens)

    if factor == 1.0:
        assert compare_steered_logits(dictionary, {7: 3.0}, steered, "a test").error < 1e-6
        return
    with pytest.raises(ValueError, match="steered logits differ"):
        compare_steered_logits(dictionary, {7: 3.0}, steered, "a test")


def test_steering_vector_refusals(tmp_path: Path) -> None:
    folder = saved(random_sae("blocks.3.hook_resid_pre", d_in=256), tmp_path / "sae")
    options = {"amounts": {7: 1.0}, "unchecked": True}
    with pytest.raises(ValueError, match="no module"):
        export(folder, "lm-eval", tmp_path / "out", **options)
    folder = saved(random_sae("blocks.3.hook_mlp_out"), tmp_path / "mlp")
    with pytest.raises(ValueError, match="not known to be"):
        export(folder, "nnsight", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="--latent"):
        export(folder, "lm-eval", tmp_path / "out", unchecked=True)
    folder = saved(random_sae(), tmp_path / "resid")
    with pytest.raises(ValueError, match="latents are 0 to 66"):
        export(folder, "lm-eval", tmp_path / "out", amounts={D_SAE: 1.0}, unchecked=True)
    assert not (tmp_path / "out").exists()


def test_steering_vector_of_a_model_elsewhere_is_not_written(tmp_path: Path) -> None:
    needs("lm_eval")
    folder = saved(random_sae(), tmp_path / "resid")
    with pytest.raises(ValueError, match="not a folder"):
        export(folder, "lm-eval", tmp_path / "out", amounts={7: 1.0})
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the comparison can fail


@pytest.mark.parametrize(
    "wrong",
    [
        {"subtracts_b_dec": False},  # b_dec not folded
        {"threshold": lambda t: t * 1.02},
        {"W_dec": lambda t: t + 1e-4 * torch.randn(t.shape)},
        {"b_dec": lambda t: t * 1.001},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_comparison_catches_a_wrong_file(wrong: dict) -> None:
    right = Parameters.of(random_sae())
    tensors = right.tensors()
    for name, change in wrong.items():
        if callable(change):
            tensors[name] = change(tensors[name])
    got = Parameters.named(tensors, wrong.get("subtracts_b_dec", True))
    compare_dictionary(right, right.encode, lambda x: right.decode(right.encode(x), x), "itself")
    with pytest.raises(ValueError, match="differ by"):
        compare_dictionary(right, got.encode, lambda x: got.decode(got.encode(x), x), "a test")


def test_nothing_is_left_when_the_comparison_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Parameters, "fold_b_dec", lambda self: self)
    with pytest.raises(ValueError, match="nothing was written"):
        export(saved(random_sae(), tmp_path / "sae"), "gemma-scope", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    export(folder, "gemma-scope", tmp_path / "out")
    export(folder, "saelens", tmp_path / "out")
    assert not (tmp_path / "out" / "params.npz").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier export"):
        export(folder, "saelens", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        export(folder, "saelens", tmp_path / "file")


def test_missing_tool_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("jumprelu_plugin.formats.checking.find_spec", lambda module: None)
    folder = saved(random_sae(), tmp_path / "sae")
    with pytest.raises(ImportError, match=r"--no-deps dictionary-learning.*\n.*--unche"):
        export(folder, "dictionary-learning", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(folder, "dictionary-learning", tmp_path / "out", unchecked=True) is None
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] is None
    same_outputs(
        load_dictionary(tmp_path / "out").as_sae()(INPUTS), SAE.load_from_disk(folder)(INPUTS)
    )


# ---------------------------------------------------------------- bad input


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


# ---------------------------------------------------------------- the command


def test_command(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    run = CliRunner().invoke
    done = run(
        app, ["export", str(folder), "--to", "gemma-scope", "--output_path", f"{tmp_path}/out"]
    )
    assert done.exit_code == 0 and "largest relative error" in done.output.replace("\n", " ")
    listed = run(app, ["export", "--list"])
    assert all(name in listed.output for name in exports.TARGETS)
    common = ["export", str(folder), "--output_path", "x"]
    assert "--fold_gain: not an option of --to gemma-scope" in refusal(
        [*common, "--to", "gemma-scope", "--fold_gain"]
    )
    assert "expected one of" in refusal([*common, "--to", "x"])
    assert "--list" in refusal(["export"])
    assert "1 latents and 0 amounts" in refusal([*common, "--to", "lm-eval", "--latents", "3"])


def refusal(command: list[str]) -> str:
    """What a command that is refused prints, out of its frame."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())
