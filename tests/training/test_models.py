"""The model that a run's config names, and what it is loaded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.formats.saved import load_saved
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner, language_model
from tests.families import D, model_folder
from tests.tiny import RESIDUAL, tiny_tokens
from tests.training.runs import BATCH, config, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder("gpt2", tmp_path_factory.mktemp("gpt2"))


def run_config(folder: Path, model: Path, **fields: Any) -> Any:
    sae = JumpReLUTrainingSAEConfig(d_in=D, d_sae=41, target_l0=7, step_kernel="sparse")
    given = {"model_class_name": "TransformerBridge", "checkpoint_path": None, "sae": sae}
    return config(folder, model_name=str(model), **{**given, **fields})


def test_keyword_arguments_hold_for_a_folder(gpt2: Path, tmp_path: Path) -> None:
    keywords = {"dtype": "bfloat16", "use_hook_mlp_in": True}
    model = language_model(run_config(tmp_path, gpt2, model_from_pretrained_kwargs=keywords))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.cfg.use_hook_mlp_in
    wrong = run_config(tmp_path, gpt2, model_from_pretrained_kwargs={"nonsense": 3})
    with pytest.raises(ValueError, match="holds 'nonsense'"):
        JumpReLUTrainingRunner(wrong)
    with pytest.raises(ValueError, match="'HookedGiraffe': expected one of"):
        language_model(run_config(tmp_path, gpt2, model_class_name="HookedGiraffe"))


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("blocks.1.hook_mlp_in", "does not fire.*set_use_hook_mlp_in"),
        ("blocks.1.attn.hook_pattern", "not one vector a token"),
    ],
)
def test_a_hook_that_gives_no_vectors_is_refused(
    hook: str, words: str, gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        JumpReLUTrainingRunner(run_config(tmp_path, gpt2, hook_name=hook), token_rows())


def test_a_plain_model_in_a_folder_is_trained_on_and_judged(gpt2: Path, tmp_path: Path) -> None:
    cfg = run_config(
        tmp_path,
        gpt2,
        model_class_name="AutoModelForCausalLM",
        hook_name="transformer.h.1",
        training_tokens=20 * BATCH,
        lr_decay_steps=0,
    )
    runner = JumpReLUTrainingRunner(cfg, token_rows(), check_first=False)
    assert isinstance(runner.model, HookedProxyLM)
    runner.run()
    saved = load_saved(tmp_path / "output")
    assert saved.choice.model_class_name == "AutoModelForCausalLM"
    found = evaluate(saved.model, saved.dictionary, tiny_tokens(5, 13))
    # The same dictionary at the same place of a bridge, whose hook has TransformerLens' name.
    bridge = language_model(run_config(tmp_path, gpt2))
    wanted = evaluate(bridge, saved.dictionary, tiny_tokens(5, 13), hook_in=RESIDUAL)
    assert found.fvu == pytest.approx(wanted.fvu, rel=1e-4)
    assert found.loss_spliced == pytest.approx(wanted.loss_spliced, rel=1e-4)
