"""What is trained by name records how its model was loaded, and is judged on that model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models.options import keywords_to_record, named_model
from jumprelu_plugin.training.activations.cache.settings import CacheSettings
from tests.tiny import tiny_hf, tiny_tokenizer, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
# A hook that fires where a flag is given alone, and weights that are not in the default's dtype.
HOOK, FLAG = "blocks.1.hook_mlp_in", {"use_hook_mlp_in": True}
RECORDED = {**FLAG, "dtype": "bfloat16"}
SHORT = "--training_tokens 93 --train_batch_size_tokens 31 --d_sae 41"
LAYERS = f"--hook_name blocks.{{layer}}.hook_mlp_in --layers 1 --target_l0 5 {SHORT}"
SWEEP = f"--hook_names {HOOK} --l0 5 --architectures jumprelu-plugin --held_out 3 {SHORT}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 and tokens to train on."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny_tokenizer(folder)
    tiny_hf().save_pretrained(folder)
    (folder / "text").mkdir()
    tokens = Dataset.from_dict({"tokens": tiny_tokens(97, 13).tolist()})
    tokens.to_parquet(folder / "text" / "train.parquet")
    return folder


def invoke(command: str, folder: Path, *given: Any) -> Any:
    of_all = ["--model_name", folder, "--dataset_path", folder / "text", "--context_size", 13]
    return CliRunner().invoke(app, [command, *map(str, (*of_all, *given))])


@pytest.mark.parametrize(
    ("command", "flags", "made"),
    [
        ("train-transcoders", LAYERS, "layer_1/cfg.json"),
        ("train-clt", LAYERS, "cross_layer.json"),
        ("sweep", SWEEP, "**/cfg.json"),
    ],
)
def test_a_command_takes_keyword_arguments_and_records_them(
    command: str, flags: str, made: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [*flags.split(), "--output_path", out]
    result = invoke(command, folder, *given)
    assert result.exit_code == 2 and 'use_hook_mlp_in": true' in result.output, result.output
    assert not (out / "settings.json").exists()
    loaded = ["--model_from_pretrained_kwargs", json.dumps(FLAG), "--dtype", "bfloat16"]
    result = invoke(command, folder, *given, *loaded)
    assert result.exit_code == 0, result.output
    (config,) = out.glob(made)
    saved = json.loads(config.read_text())
    if command == "train-clt":
        assert (saved["model_from_pretrained_kwargs"], saved["dtype"]) == (FLAG, "bfloat16")
    else:
        assert saved["metadata"]["model_from_pretrained_kwargs"] == RECORDED
    of = out if command == "train-clt" else config.parent
    judged = CliRunner().invoke(app, ["evaluate", str(of), "--sequences", "3"])
    assert judged.exit_code == 0, judged.output


def test_a_cache_is_written_with_them(folder: Path, tmp_path: Path) -> None:
    given = ["--hook_names", HOOK, "--training_tokens", 130, "--output_path", tmp_path / "cache"]
    assert invoke("cache-activations", folder, *given).exit_code == 2
    kwargs = ["--model_from_pretrained_kwargs", json.dumps(FLAG)]
    result = invoke("cache-activations", folder, *given, *kwargs)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("dtype", "given", "recorded"),
    [
        ("float32", None, {}),
        ("float32", FLAG, FLAG),
        ("float32", {"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ("bfloat16", FLAG, RECORDED),
        ("bfloat16", {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_a_dtype_is_recorded_where_it_is_not_float32(
    dtype: str, given: dict[str, Any] | None, recorded: dict[str, Any], folder: Path
) -> None:
    settings = CacheSettings(
        model_name=str(folder), dtype=dtype, model_from_pretrained_kwargs=given
    )
    assert keywords_to_record(settings) == recorded
    found = next(named_model(settings).parameters()).dtype
    assert str(found) == f"torch.{recorded.get('dtype', 'float32')}"


def test_two_dtypes_are_refused() -> None:
    settings = CacheSettings(dtype="float16", model_from_pretrained_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="dtype is bfloat16 and float16.*give one"):
        named_model(settings)
