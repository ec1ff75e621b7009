"""A cross-layer transcoder in circuit-tracer's format, read by its own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jumprelu_plugin.formats import circuit_tracer, circuit_tracer_clt, export
from jumprelu_plugin.transcoders.clt import load_clt, save_clt
from tests.dictionaries import needs
from tests.transcoders.clt.random_clt import D_IN, D_SAE, LAYERS, random_clt

pytestmark = pytest.mark.usefixtures("one_thread")


def exportable(folder: Path, d: int = D_IN, **fields: Any) -> Path:
    return save_clt(random_clt(d, d, model_name="some-model", **fields), folder)


def test_the_files_are_circuit_tracer_s(tmp_path: Path) -> None:
    """By its documented layout; what its loader makes of them is tested where it is installed."""
    source = exportable(tmp_path / "clt")
    export(source, "circuit-tracer", tmp_path / "out", n_layers=LAYERS, unchecked=True)
    model, out = load_clt(source), tmp_path / "out"
    config = (out / "config.yaml").read_text()
    assert "model_kind: cross_layer_transcoder" in config
    assert "feature_input_hook: ln2.hook_normalized" in config
    assert "feature_output_hook: hook_mlp_out" in config
    for index, layer in enumerate(model.sources):
        encoder = load_file(out / f"W_enc_{index}.safetensors")
        assert torch.equal(encoder[f"W_enc_{index}"], layer.W_enc.t())
        assert torch.equal(encoder[f"threshold_{index}"], layer.threshold)
        assert torch.equal(encoder[f"b_enc_{index}"], layer.b_enc)
        assert torch.equal(encoder[f"b_dec_{index}"], layer.b_dec)
        decoder = load_file(out / f"W_dec_{index}.safetensors")[f"W_dec_{index}"]
        assert decoder.shape == (D_SAE, LAYERS - index, D_IN)
        assert torch.equal(decoder[:, -1], layer.W_dec[:, -D_IN:])


def test_circuit_tracer_reads_the_same_function(tmp_path: Path) -> None:
    needs("circuit_tracer")
    source = exportable(tmp_path / "clt")
    found = export(source, "circuit-tracer", tmp_path / "out", n_layers=LAYERS)
    assert found is not None and found.error < 1e-5 and found.active > 1
    loaded = circuit_tracer.load_transcoders(tmp_path / "out")
    assert type(loaded).__name__ == "CrossLayerTranscoder"
    x = 3 * torch.randn(LAYERS, 7, D_IN)
    torch.testing.assert_close(loaded(x), load_clt(source)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_file_that_reads_differently_is_not_written(name: str) -> None:
    right, wrong = random_clt(), random_clt()
    circuit_tracer_clt.compare_clt(right, random_clt(), "itself")
    getattr(wrong.sources[1], name).data.mul_(1.001)
    with pytest.raises(ValueError, match="read back with itself, the .* differ"):
        circuit_tracer_clt.compare_clt(right, wrong, "itself")


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"hook_in": "blocks.{layer}.attn.hook_z"}, {}, "transcoders that read .*ln2"),
        ({"hook_out": "blocks.{layer}.hook_resid_post"}, {}, "that write .*hook_mlp_out"),
        ({}, {"n_layers": 5}, "layers 0 to 2, and the model 5"),
        ({}, {"pad_missing": True}, "leave out --pad_missing and --fold_scale"),
    ],
)
def test_what_circuit_tracer_cannot_take_is_refused(
    fields: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = exportable(tmp_path / "clt", **fields)
    options = {"n_layers": LAYERS, **options}
    with pytest.raises(ValueError, match=message):
        export(source, "circuit-tracer", tmp_path / "out", unchecked=True, **options)
    assert not (tmp_path / "out").exists()


def test_other_widths_and_targets_are_refused(tmp_path: Path) -> None:
    source = save_clt(random_clt(model_name="m"), tmp_path / "clt")
    with pytest.raises(ValueError, match="reads width 13 and writes width 11"):
        export(source, "circuit-tracer", tmp_path / "out", n_layers=LAYERS, unchecked=True)
    with pytest.raises(ValueError, match="cross-layer transcoder.* use --to circuit-tracer"):
        export(source, "saelens", tmp_path / "out")
