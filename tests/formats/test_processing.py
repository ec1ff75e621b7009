"""How the model was loaded in the training: which of it changes activations, and who is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig

from jumprelu_plugin.formats import export
from jumprelu_plugin.formats.processing import _BORDERS
from jumprelu_plugin.models.loading_keywords import PROCESSING
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.folder import save_clt
from tests.dictionaries import MLP_OUT, NORMED, RESID, random_sae, random_transcoder, saved

CENTERED = {"center_writing_weights": True}
# By target: an SAE or a transcoder that it takes.
TAKEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma-scope": (random_sae(), {}),
    "gemma-scope-2": (random_sae(), {}),
    "dictionary-learning": (random_sae(), {}),
    "lm-eval": (random_sae(), {"amounts": {7: 20.0}}),
    "nnsight": (random_sae(), {"amounts": {7: 20.0}}),
    "circuit-tracer": (random_transcoder(0), {"n_layers": 1}),
}


def trained_on(sae: Any, keywords: dict[str, Any], folder: Path) -> Path:
    sae = copy.deepcopy(sae)
    sae.cfg.metadata.model_from_pretrained_kwargs = keywords
    return saved(sae, folder)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    """A random model with layer norms, gains and biases."""
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=23, n_ctx=17, d_head=7, n_heads=3, d_mlp=29, d_vocab=31,
        act_fn="gelu_new", normalization_type="LN", seed=3,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", PROCESSING)
def test_which_processing_changes_what_goes_into_a_block_and_out(
    name: str, model: HookedTransformer
) -> None:
    processed = copy.deepcopy(model)
    chosen = {key: key == name for key in PROCESSING}
    processed.load_and_process_state_dict(copy.deepcopy(model.state_dict()), **chosen)
    tokens = torch.arange(2, 15)[None]
    _, before = model.run_with_cache(tokens)
    _, after = processed.run_with_cache(tokens)
    differ = [
        hook
        for hook in _BORDERS
        if not torch.allclose(before[f"blocks.1.{hook}"], after[f"blocks.1.{hook}"], atol=1e-4)
    ]
    # A layer norm's own output is centered already.
    stream = [hook for hook in _BORDERS if "normalized" not in hook]
    assert differ == (stream if name == "center_writing_weights" else [])


@pytest.mark.parametrize("target", TAKEN)
def test_a_processed_model_is_said_or_refused(target: str, tmp_path: Path) -> None:
    sae, options = TAKEN[target]
    name = "layer_0" if target == "circuit-tracer" else "sae"

    def exported(keywords: dict[str, Any], part: str) -> None:
        folder = trained_on(sae, keywords, tmp_path / part / name)
        source = folder.parent if target == "circuit-tracer" else folder
        export(source, target, tmp_path / part / "out", unchecked=True, **options)

    with pytest.raises(ValueError, match=r'"center_writing_weights": true}.*--to saelens can'):
        exported(CENTERED, "centered")
    assert not (tmp_path / "centered" / "out").exists()
    # These are what the tools load, or change other activations.
    exported({"center_writing_weights": False, "fold_ln": True, "dtype": "float32"}, "plain")


@pytest.mark.parametrize("target", TAKEN)
@pytest.mark.parametrize("keywords", [{"revision": "step3000"}, {"checkpoint_index": 0}])
def test_weights_that_the_name_does_not_choose_are_said(
    keywords: dict[str, Any], target: str, tmp_path: Path
) -> None:
    sae, options = TAKEN[target]
    folder = trained_on(sae, keywords, tmp_path / "layer_0")
    source = folder.parent if target == "circuit-tracer" else folder
    with pytest.warns(UserWarning, match=f"{json.dumps(keywords)}.*{target} name the model alone"):
        export(source, target, tmp_path / "out", unchecked=True, **options)


def test_fold_gain_reads_the_gain_of_the_weights_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def no_hub(name: str, model_class_name: str, **keywords: Any) -> None:
        asked.append(keywords)
        raise OSError(f"{name} is not here")

    monkeypatch.setattr("jumprelu_plugin.formats.gemma_scope_2.load_model", no_hub)
    transcoder = copy.deepcopy(random_transcoder(0))
    transcoder.cfg.metadata.model_name = "google/gemma-2-2b"
    folder = trained_on(transcoder, {"revision": "a1", "fold_ln": True}, tmp_path / "t")
    with pytest.raises(OSError, match="not here"):
        export(folder, "gemma-scope-2", tmp_path / "out", fold_gain=True, unchecked=True)
    assert asked == [{"revision": "a1"}]


def test_a_cross_layer_transcoder_of_a_processed_model_is_refused(tmp_path: Path) -> None:
    cfg = CLTConfig(
        d_in=13, d_out=13, d_sae=19, layers=(0, 1), hook_in=f"blocks.{{layer}}.{NORMED}",
        hook_out=f"blocks.{{layer}}.{MLP_OUT}", model_name="m",
        model_from_pretrained_kwargs=CENTERED,
    )  # fmt: skip
    save_clt(CrossLayerTranscoder(cfg), tmp_path / "clt")
    with pytest.raises(ValueError, match="center_writing_weights.*--to saelens can say so"):
        export(tmp_path / "clt", "circuit-tracer", tmp_path / "o", n_layers=2, unchecked=True)


def test_saelens_files_say_it(tmp_path: Path) -> None:
    folder = trained_on(random_sae(), CENTERED, tmp_path / "sae")
    export(folder, "saelens", tmp_path / "out")
    metadata = SAE.load_from_disk(tmp_path / "out").cfg.metadata
    assert metadata.model_from_pretrained_kwargs == CENTERED


@pytest.mark.parametrize(
    ("hook", "keywords", "refused"),
    [
        # sae-dashboard processes so by itself, and turns on the MLP's input.
        (RESID, CENTERED, None),
        ("attn.hook_z", {"fold_value_biases": True}, None),
        ("hook_mlp_in", {"use_hook_mlp_in": True}, None),
        ("attn.hook_z", {"refactor_factored_attn_matrices": True}, "refactor_factored"),
        ("hook_attn_in", {"use_attn_in": True}, "use_attn_in"),
        (RESID, {"refactor_factored_attn_matrices": True, "use_attn_in": True}, None),
    ],
)
def test_sae_dashboard_gets_what_it_loads(
    hook: str, keywords: dict[str, Any], refused: str | None, tmp_path: Path
) -> None:
    folder = trained_on(random_sae(f"blocks.2.{hook}"), keywords, tmp_path / "sae")
    if refused is not None:
        with pytest.raises(ValueError, match=f"{refused}.*at blocks.2.{hook}"):
            export(folder, "neuronpedia", tmp_path / "out", unchecked=True)
        return
    export(folder, "neuronpedia", tmp_path / "out", unchecked=True)
    written = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert written["metadata"]["model_from_pretrained_kwargs"] == keywords
