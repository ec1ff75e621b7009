"""A latent as a steering vector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jumprelu_plugin import formats as exports
from jumprelu_plugin.analysis.steering import Add, steer
from jumprelu_plugin.formats import export, saelens
from jumprelu_plugin.formats.steering_vectors import compare_steered_logits
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from tests.dictionaries import D_SAE, needs, random_sae, saved


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
