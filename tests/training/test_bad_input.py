"""What a user gets wrong, through the runner and through `jumprelu train`.

The message says what was given, what was expected and what to do; the command exits with 2 and
shows no traceback; and no file is left behind, finished or half-written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig
from typer.testing import CliRunner

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.recipes import get_recipe
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.tiny import CONTEXT, D_MODEL, HEADS, RESIDUAL, WIDTH
from tests.training.folders import files, flags

pytestmark = pytest.mark.usefixtures("one_thread", "wide_terminal")
# What is changed, and what the message must name: the given, the expected, the remedy.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown hook": (
        {"hook_name": "blocks.1.hook_resid_pots"},
        ["blocks.1.hook_resid_pots", "did you mean blocks.1.hook_resid_post"],
    ),
    "d_in of another hook": (
        {"d_in": 31},
        ["d_in is 31", f"{RESIDUAL} are {D_MODEL} wide", f"set d_in={D_MODEL}"],
    ),
    "d_in of one head": (
        {"hook_name": HEADS, "d_in": 10},
        ["d_in is 10", f"{WIDTH[HEADS]} wide (heads flattened)", f"set d_in={WIDTH[HEADS]}"],
    ),
    "negative bandwidth": (
        {"jumprelu_bandwidth": -0.25},
        ["jumprelu_bandwidth is -0.25", "greater than 0", "leave it out"],
    ),
    "zero threshold": (
        {"jumprelu_init_threshold": 0.0},
        ["jumprelu_init_threshold is 0.0", "greater than 0", "leave it out"],
    ),
    "no target and no coefficient": (
        {"target_l0": None},
        ["neither target_l0 nor l0_coefficient", "give target_l0"],
    ),
    "infinite activations": (
        {"model_name": "{root}/infinite"},
        [RESIDUAL, "NaN or infinite", "float32 or bfloat16"],
    ),
    "no tokenizer": (
        {"model_name": "{root}/no_tokenizer"},
        ["no_tokenizer has no tokenizer", "tokenizer.json", "tokenizer.save_pretrained"],
    ),
    "no model in the folder": (
        {"model_name": "{root}/empty"},
        ["empty has no config.json", "model.save_pretrained"],
    ),
    "no such folder": ({"model_name": "./nowhere"}, ["no model folder nowhere", "hub name"]),
    "a hub model, offline": (
        {"model_name": "google/gemma-2-2b", "hook_name": "blocks.12.hook_resid_post"},
        ["'google/gemma-2-2b' could not be loaded", "accept the license", "hf auth login"],
    ),
    "unknown model": (
        {"model_name": "gema-2-2b"},
        ["no model 'gema-2-2b'", "google/gemma-2-2b", "tiny-gemma-2"],
    ),
    "too little text": (
        {"dataset_path": "{root}/short"},
        ["too little text", "1 documents", "context_size 13", "more text or a smaller"],
    ),
    "a separator of another model": (
        {"sequence_separator_token": 99999},
        ["sequence_separator_token is 99999", "has 53 tokens", "bos, eos or sep"],
    ),
    "a file of text": (
        {"dataset_path": "{root}/short/train.jsonl"},
        ["short/train.jsonl, a file", "a folder is expected", "/short, where it holds no other"],
    ),
    "no folder of text": ({"dataset_path": "{root}/absent"}, ["no such folder", "hub name"]),
    "no text": ({"dataset_path": "{root}/none"}, ["no rows", "give another"]),
    "context longer than the model's": (
        {"context_size": CONTEXT + 1},
        [f"context_size is {CONTEXT + 1}", f"at most {CONTEXT}", f"set context_size={CONTEXT}"],
    ),
    "buffer smaller than a batch": (
        {"n_batches_in_buffer": 2},
        ["26 rows", "takes 31", "give n_batches_in_buffer=3 or more"],
    ),
    "output folder of another SAE": (
        {"output_path": "{root}/sae"},
        ["/sae already holds an SAE", "another output_path"],
    ),
    "an argument that the model does not take": (
        {"model_kwargs": '{{"foo": 1}}'},
        ["model_kwargs is {'foo': 1}", "unexpected keyword argument 'foo'", "or leave it out"],
    ),
    "an argument that the run gives the model": (
        {"model_kwargs": '{{"prepend_bos": true}}'},
        ["model_kwargs is {'prepend_bos': True}", "multiple values", "or leave it out"],
    ),
    "not a checkpoint": (
        {"resume_from_checkpoint": "{root}/model"},
        ["/model is not a checkpoint", "cfg.json", "n_checkpoints"],
    ),
}


@pytest.mark.parametrize("way", ["python", "command"])
@pytest.mark.parametrize("what", WRONG)
def test_a_run_that_cannot_work_is_refused(
    what: str, way: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = WRONG[what]
    given = flags(folders, tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    before = files(folders, tmp_path)
    if way == "python":
        cfg = parse_flags(["--architecture", "jumprelu", *given])
        with pytest.raises((ValueError, OSError)) as refusal:
            JumpReLUTrainingRunner(cfg).run()
        message = str(refusal.value)
    else:
        result = CliRunner().invoke(app, ["train", *given])
        assert result.exit_code == 2, result.output
        message = result.output
        assert "Traceback" not in message
    for word in words:
        assert word in message
    assert files(folders, tmp_path) == before


def test_the_run_that_the_others_change_works(folders: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *flags(folders, tmp_path)])
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "output").iterdir())
    assert names == [
        "cfg.json",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--architecture", "relu"], ["invalid choice: 'relu'", "'jumprelu'", "train --help"]),
        (["--no_such", "3"], ["unrecognized arguments: --no_such 3", "train --help"]),
        (["--d_in", "wide"], ["--d_in: invalid int value: 'wide'", "train --help"]),
        (["--recipe", "gemma"], ["no recipe 'gemma'", "default, gemma_scope"]),
    ],
)
def test_wrong_flags_are_named(given: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, ["train", *given])
    assert result.exit_code == 2
    assert all(word in result.output for word in words), result.output
    assert len(result.output.strip().splitlines()) <= 3  # and not a page of usage


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'gemma'.*default, gemma_scope"):
        get_recipe("gemma")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["steer", "{root}/sae", "--latent", "41", "--prompt", "w7"], ["d_sae 41", "0 to 40"]),
        (["steer", "{root}/sae", "--latent", "-1", "--prompt", "w7"], ["d_sae 41", "0 to 40"]),
        (["evaluate", "{root}/model"], ["model holds no dictionary", "cfg.json"]),
        (["evaluate", "{root}/sae", "--model_name", "{root}/no_tokenizer"], ["has no tokenizer"]),
    ],
)
def test_other_commands_refuse_in_the_same_way(
    given: list[str], words: list[str], folders: Path
) -> None:
    result = CliRunner().invoke(app, [text.format(root=folders) for text in given])
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output


def test_a_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUMPRELU_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["train", "--recipe", "gemma"])
    assert isinstance(result.exception, ValueError)


def test_an_empty_dataset_object_is_refused(folders: Path, tmp_path: Path) -> None:
    cfg = parse_flags(["--architecture", "jumprelu", *flags(folders, tmp_path)])
    with pytest.raises(ValueError, match="no rows.*give another"):
        JumpReLUTrainingRunner(cfg, override_dataset=Dataset.from_dict({"tokens": []}))


def test_text_of_special_tokens_alone_does_not_run_for_ever(folders: Path, tmp_path: Path) -> None:
    given = flags(folders, tmp_path, exclude_special_tokens=True)
    cfg: LanguageModelSAERunnerConfig[Any] = parse_flags(["--architecture", "jumprelu", *given])
    rows = Dataset.from_dict({"tokens": [[2] + [1] * 12] * 5})
    with pytest.raises(ValueError, match="special tokens alone.*give more text"):
        JumpReLUTrainingRunner(cfg, override_dataset=rows).run()


def test_a_checkpoint_of_another_size_is_refused(folders: Path, tmp_path: Path) -> None:
    assert (
        CliRunner().invoke(app, ["train", *flags(folders, tmp_path, n_checkpoints=1)]).exit_code
        == 0
    )
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    given = flags(folders, tmp_path / "b", d_sae=43, resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"d_sae 41 and this run 43; resume with the config"):
        JumpReLUTrainingRunner(parse_flags(["--architecture", "jumprelu", *given]))


def test_a_hub_name_says_what_to_do_about_the_license() -> None:
    with pytest.raises(OSError, match=r"google/gemma-2-2b.*\n.*accept the license.*hf auth login"):
        load_model("google/gemma-2-2b")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"l0_warm_up_steps": 500}, "l0_warm_up_steps is 500 and l0_coefficient is None"),
        ({"jumprelu_tanh_scale": 2.0}, "jumprelu_tanh_scale is 2.0.*has no tanh"),
        ({"target_l0_warm_up_steps": 9}, "target_l0_warm_up_steps is 9.*target_l0_start_ratio"),
        ({"target_l0_start_ratio": 2.0}, "target_l0_start_ratio is 2.0.*target_l0_warm_up_steps"),
        (
            {"jumprelu_bandwidth": 0.5, "jumprelu_bandwidth_std": 2.0},
            "jumprelu_bandwidth_std is 2.0 and jumprelu_bandwidth is 0.5",
        ),
        ({"pre_act_loss_latents": "all"}, "pre_act_loss_latents is 'all'.*coefficient"),
        (
            {"matryoshka_loss_weight": 0.5, "matryoshka_widths": [97]},
            "matryoshka_loss_weight is 0.5.*matryoshka_widths",
        ),
    ],
)
def test_a_field_without_effect_is_refused(fields: dict[str, Any], words: str) -> None:
    cfg = JumpReLUTrainingSAEConfig(**{"d_in": 13, "d_sae": 97, "target_l0": 7.0, **fields})
    with pytest.raises(ValueError, match=words):
        JumpReLUTrainingSAE(cfg)
