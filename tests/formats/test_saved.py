"""A saved dictionary with the model and the text its metadata names, or the user does."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from typer.testing import CliRunner

from jumprelu_plugin.analysis.generation import generate, generate_steered, intervention
from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.formats import export
from jumprelu_plugin.formats.saved import SavedDictionary, load_saved, load_saved_sae
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.models.sequences import read_sequences
from jumprelu_plugin.training.text_source import local_dataset
from jumprelu_plugin.transcoders.clt import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.config import CLTConfig
from jumprelu_plugin.transcoders.clt.folder import save_clt
from tests.dictionaries import D_OUT, random_sae, random_transcoder
from tests.tiny import RESIDUAL, tiny_sae

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 17


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(EMBEDDED_MODEL)


def saved_sae(folder: Path, **metadata: Any) -> Path:
    sae = tiny_sae(RESIDUAL, d_in=256)
    sae.cfg.metadata.model_name = EMBEDDED_MODEL
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    sae.save_model(folder)
    return folder


def text_folder(folder: Path, **splits: str) -> str:
    """A dataset on disk whose every document repeats one word, another in every split."""
    folder.mkdir()
    for split, word in splits.items():
        lines = [json.dumps({"text": f"{word} " * 40})] * 12
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


# ---------------------------------------------------------------- which model


def test_what_is_left_out_is_as_recorded() -> None:
    metadata = {
        "model_name": "m",
        "model_class_name": "SAETransformerBridge",
        "model_from_pretrained_kwargs": {"torch_dtype": "bfloat16", "n_devices": 2},
        "dataset_path": "d",
        "context_size": 31,
        "prepend_bos": False,
    }
    choice = ModelOptions().resolve(metadata, "folder")
    assert (choice.model_name, choice.model_class_name) == ("m", "SAETransformerBridge")
    assert (choice.dataset_path, choice.context_size, choice.prepend_bos) == ("d", 31, False)
    assert choice.dtype == "bfloat16" and choice.from_pretrained_kwargs == {"n_devices": 2}

    given = ModelOptions("other", "HookedTransformer", "", "cuda", "float16")
    choice = given.resolve(metadata, "folder")
    assert (choice.model_name, choice.model_class_name) == ("other", "HookedTransformer")
    assert (choice.dataset_path, choice.device, choice.dtype) == ("", "cuda", "float16")
    assert choice.from_pretrained_kwargs == {}  # they were recorded for another model
    assert "dtype float16 in place of the recorded bfloat16" in choice.differences
    assert "model_name other in place of the recorded m" in choice.differences


@pytest.mark.parametrize("files", ["saelens", "gemma-scope-2"])
def test_each_difference_is_said(
    files: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of formats without SAELens' metadata, whose files name the hook and the model."""
    folder = saved_sae(tmp_path / "sae")
    if files != "saelens":
        export(folder, files, tmp_path / "out", unchecked=True)
        folder = tmp_path / "out"
    other = "blocks.3.hook_resid_post"
    loaded = load_saved(folder, ModelOptions(EMBEDDED_MODEL, hook_name=other, dtype="float32"))
    assert loaded.dictionary.cfg.metadata.hook_name == other
    assert f"hook_name {other} in place of the recorded {RESIDUAL}" in caplog.text
    assert "model_name" not in caplog.text


def test_a_cross_layer_transcoder_has_no_one_hook(tmp_path: Path) -> None:
    cfg = CLTConfig(256, 256, 19, (0, 1), "blocks.{layer}.ln2.hook_normalized",
                    "blocks.{layer}.hook_mlp_out", EMBEDDED_MODEL)  # fmt: skip
    save_clt(CrossLayerTranscoder(cfg), tmp_path / "clt")
    with pytest.raises(ValueError, match="several layers: leave out --hook_name"):
        load_saved(tmp_path / "clt", ModelOptions(hook_name=RESIDUAL), clt=True)


def test_what_nothing_records_has_a_default() -> None:
    choice = ModelOptions().resolve(
        {"model_name": "m", "model_class_name": "HookedTransformer"}, "folder"
    )
    assert choice.model_class_name == "HookedSAETransformer"
    assert (choice.dataset_path, choice.context_size, choice.prepend_bos) == ("", None, True)
    assert choice.dtype == "float32"
    with pytest.raises(ValueError, match="in folder does not name its model.*--model_name"):
        ModelOptions().resolve({}, "folder")


@pytest.mark.parametrize("kind", ["HookedSAETransformer", "SAETransformerBridge"])
def test_a_model_loads_in_the_dtype_that_is_given(kind: str) -> None:
    loaded = load_model(EMBEDDED_MODEL, kind, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.cfg.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="float31"):
        load_model(EMBEDDED_MODEL, kind, dtype="float31")


def test_the_command_evaluates_on_what_the_metadata_names(tmp_path: Path) -> None:
    text = text_folder(tmp_path / "text", train="island", validation="border")
    folder = saved_sae(tmp_path / "sae", dataset_path=text, context_size=CONTEXT)
    saved = load_saved(folder)
    _, tokens = saved.sequences(3)
    assert tokens.shape == (3, CONTEXT)
    assert "border border" in saved.model.tokenizer.decode(tokens[0]) and "border" in saved.prompt()
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        record = tmp_path / f"{dtype}.json"
        flags = f"--sequences 3 --dtype {dtype} --output-path {record}"
        result = CliRunner().invoke(app, ["evaluate", str(folder), *flags.split()])
        assert result.exit_code == 0, result.output
        found[dtype] = json.loads(record.read_text())["result"]
    assert found["float32"]["n_sequences"] == 3
    # All but BOS, of which SAELens puts one between two documents.
    assert 3 * (CONTEXT - 2) <= found["float32"]["n_tokens"] <= 3 * (CONTEXT - 1)
    assert found["bfloat16"]["loss_clean"] != found["float32"]["loss_clean"]
    assert found["bfloat16"]["loss_clean"] == pytest.approx(
        found["float32"]["loss_clean"], rel=0.05
    )


@pytest.mark.parametrize("pair", [False, True])
def test_a_checkpoint_is_judged_on_activations_as_they_are(pair: bool, tmp_path: Path) -> None:
    """Its weights take s·(x - c), and a transcoder's give s_out·(y - c_out)."""
    sae = random_transcoder(skip=True, d_out=D_OUT) if pair else random_sae()
    sae.cfg.normalize_activations = "expected_average_only_in"
    sae.save_model(tmp_path)
    x = torch.randn(29, sae.cfg.d_in)
    if pair:
        scale_in, scale_out = 0.37, 2.3
        center_in, center_out = torch.randn(sae.cfg.d_in), torch.randn(sae.cfg.d_out)
        scales: Any = [scale_in, scale_out, center_in.tolist(), center_out.tolist()]
    else:
        scales = scale_in = scale_out = 0.37
        center_in = center_out = torch.zeros(())
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scales}))
    raw = SAE.load_from_disk(tmp_path)
    found = load_saved_sae(tmp_path, ModelOptions())
    assert found.cfg.normalize_activations == "none"
    scaled = scale_in * (x - center_in)
    torch.testing.assert_close(found.encode(x), raw.encode(scaled))
    torch.testing.assert_close(found(x), raw(scaled) / scale_out + center_out)


def test_only_where_asked_is_a_cross_layer_transcoder_taken(tmp_path: Path) -> None:
    (tmp_path / "cross_layer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no dictionary"):
        load_saved(tmp_path)
    with pytest.raises(ValueError, match="cross_layer.json cannot be read"):
        load_saved(tmp_path, clt=True)


# ---------------------------------------------------------------- which text


def test_no_sequence_is_in_both_parts(model: Any, tmp_path: Path) -> None:
    split = text_folder(tmp_path / "two", train="island", test="border")
    fit, held_out = read_sequences(model, split, context_size=CONTEXT, held_out=3, train=5)
    assert fit.shape == (5, CONTEXT) and held_out.shape == (3, CONTEXT)
    words = [model.tokenizer.decode(part.flatten()) for part in (fit, held_out)]
    assert "border" not in words[0] and "island" not in words[1]

    lines = [json.dumps({"text": f"{number} " * 40}) for number in range(9)]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.jsonl").write_text("\n".join(lines))
    one = str(tmp_path / "one")
    fit, held_out = read_sequences(model, one, context_size=CONTEXT, held_out=3, train=5)
    everything = read_sequences(model, one, context_size=CONTEXT, held_out=8)[1]
    assert torch.equal(torch.cat([held_out, fit]), everything)
    assert len(read_sequences(model, one, context_size=CONTEXT, held_out=10_000)[1]) > 8
    with pytest.raises(ValueError, match="sequences of 17 tokens.*a longer text"):
        read_sequences(model, one, context_size=CONTEXT, held_out=10_000, train=1)


def test_what_save_to_disk_wrote_is_read(model: Any, tmp_path: Path) -> None:
    rows = torch.arange(5, 5 + 9 * CONTEXT).reshape(9, CONTEXT)
    whole = Dataset.from_dict({"tokens": rows.tolist()})
    whole.save_to_disk(tmp_path / "one")
    parts = {"train": whole.select(range(5, 9)), "test": whole.select(range(5))}
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        fit, held_out = read_sequences(
            model, str(tmp_path / name), context_size=CONTEXT, held_out=5, train=4
        )
        assert torch.equal(held_out, rows[:5]) and torch.equal(fit, rows[5:])
    DatasetDict({"test": whole}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(ValueError, match="holds the splits test, and 'train' is needed"):
        read_sequences(model, str(tmp_path / "no_train"), context_size=CONTEXT, held_out=5, train=4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([2, 5, 7], f"row 3 of the split 'train' .* has 3 tokens, fewer than .* {CONTEXT}: drop"),
        ([2] * CONTEXT + [-1], None),  # beyond the context
        ([-1] * CONTEXT, "row 3 of the split 'train' of .* holds tokens -1 to -1, .* another"),
        ([10**6] * CONTEXT, "row 3 of the split 'train' of .* holds tokens 1000000 to 1000000"),
    ],
)
def test_a_row_of_tokens_that_cannot_be_read_is_named(
    tokens: list[int], message: str | None, model: Any, tmp_path: Path
) -> None:
    rows = [[2] * CONTEXT] * 3 + [tokens] + [[2] * CONTEXT] * 3
    Dataset.from_dict({"tokens": rows}).save_to_disk(tmp_path)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        read_sequences(model, str(tmp_path), context_size=CONTEXT, held_out=2, train=5)


def test_the_beginning_of_a_sequence_is_as_asked(model: Any, tmp_path: Path) -> None:
    bos = model.tokenizer.bos_token_id
    text = text_folder(tmp_path / "text", train="island")
    for path in ("", text):
        for prepend_bos in (True, False):
            tokens = read_sequences(
                model, path, context_size=CONTEXT, held_out=2, prepend_bos=prepend_bos
            )[1]
            assert tokens.shape == (2, CONTEXT)
            assert (tokens[:, 0] == bos).all() == prepend_bos


@pytest.mark.parametrize(
    "how",
    [
        {"sequence_separator_token": None},
        {"sequence_separator_token": "eos"},
        {"sequence_separator_token": 41, "prepend_bos": False},
        {"disable_concat_sequences": True},
    ],
)
def test_text_becomes_sequences_as_it_did_in_the_training(
    how: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    """What SAELens' own store makes of the text is what the saved SAE is judged on."""
    lines = [json.dumps({"text": f"{number} " * (3 + 11 * (number % 3))}) for number in range(31)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(lines))
    place = str(tmp_path / "text")
    store = ActivationsStore(
        model, load_dataset(place, split="train", streaming=True), True, RESIDUAL, None, CONTEXT,
        256, 1, 1, 1, 1, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
        **{"prepend_bos": True, **how},
    )  # fmt: skip
    wanted = torch.cat([store.get_batch_tokens(1, True) for _ in range(5)])
    saved = saved_sae(tmp_path / "sae", dataset_path=place, context_size=CONTEXT, **how)
    choice = ModelOptions().resolve(SAE.load_from_disk(saved).cfg.metadata.to_dict(), saved)
    found = SavedDictionary(saved, None, model, choice).sequences(5)[1]
    assert torch.equal(found, wanted)
    plain = read_sequences(model, place, context_size=CONTEXT, held_out=5)[1]
    assert not torch.equal(plain, wanted)


def test_a_separator_that_is_none_is_refused(model: Any, tmp_path: Path) -> None:
    place = text_folder(tmp_path / "text", train="island")
    with pytest.raises(ValueError, match="sequence_separator_token is 'comma'; expected bos"):
        read_sequences(
            model, place, context_size=CONTEXT, held_out=2, sequence_separator_token="comma"
        )


@pytest.mark.parametrize("name", ["text", "json"])
def test_a_folder_named_as_a_reader_of_datasets_is_read_alone(
    name: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text_folder(tmp_path / name, train="island")
    for file in ("notes.txt", "notes.jsonl"):
        (tmp_path / file).write_text(json.dumps({"text": "private " * 40}) + "\n")
    words = {row["text"].split()[0] for row in local_dataset(name, streaming=False)}
    assert words == {"island"}
    (_, held_out) = read_sequences(model, name, context_size=CONTEXT, held_out=2)
    assert "private" not in model.to_string(held_out[0])


def test_the_demo_text_is_shuffled_by_seed(model: Any) -> None:
    plain, one, again, other = (
        read_sequences(model, context_size=CONTEXT, held_out=7, seed=seed)[1]
        for seed in (None, 3, 3, 4)
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, plain)


# ---------------------------------------------------------------- generation


def test_steered_text_begins_from_the_same_seed(model: Any) -> None:
    sae = tiny_sae(RESIDUAL, d_in=256)
    without, steered = generate_steered(
        model, sae, Add(7, 40.0), "The people", seed=5, new_tokens=8
    )
    assert without == generate(model, "The people", 5, 8) != steered
    assert generate_steered(model, sae, Add(7, 0.0), "The people", seed=5, new_tokens=8) == (
        without,
        without,
    )


def test_text_is_steered_with_the_bos_token_that_the_sae_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    def watched(*arguments: Any, **options: Any) -> str:
        given.append(arguments[4])
        return generate(*arguments, **options)

    monkeypatch.setattr("jumprelu_plugin.analysis.generation.generate", watched)
    for prepend_bos in (True, False):
        folder = saved_sae(tmp_path / str(prepend_bos), prepend_bos=prepend_bos)
        call = ["steer", str(folder), "--latent", "7", "--tokens", "2", "--prompt", "The people"]
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 0, result.output
    assert given == [True, True, False, False]


def test_an_intervention_has_a_name() -> None:
    assert intervention("add", 3, 2.0) == Add(3, 2.0)
    assert intervention("clamp", 3, 2.0) == Clamp(3, 2.0)
    assert intervention("ablate", 3, 2.0) == Ablate(3)
    with pytest.raises(ValueError, match="'melt'.*add, clamp, ablate"):
        intervention("melt", 3, 2.0)
