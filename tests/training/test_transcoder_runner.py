"""The runner trains, evaluates and saves one transcoder."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.training.prefetch import PrefetchingIterator

from jumprelu_plugin import recipes
from jumprelu_plugin.evaluation import evaluate
from jumprelu_plugin.saes.transcoder_config import JumpReLUTrainingTranscoderConfig
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from jumprelu_plugin.training.transcoder_evaluator import folded_copy
from tests.tiny import D_MODEL, WIDTH, tiny_tokens
from tests.training.transcoder_runs import LN, MID, OUT, POSITIONS, Z, text, transcoder_config


def runner_config(output: Path, sae: Any, hook_in: str, **changes: Any) -> Any:
    return LanguageModelSAERunnerConfig(
        **{
            "sae": sae,
            "model_name": "tiny-gemma-2-test",
            "hook_name": hook_in,
            "training_tokens": 11 * 41,
            "train_batch_size_tokens": 41,
            "context_size": POSITIONS,
            "n_batches_in_buffer": 13,
            "store_batch_size_prompts": 5,
            "n_batches_for_norm_estimate": 3,
            "exclude_special_tokens": True,
            "lr": 3e-3,
            "checkpoint_path": None,
            "output_path": str(output),
            "verbose": False,
            "logger": LoggingConfig(log_to_wandb=False),
            "model_from_pretrained_kwargs": {},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("hook_in", "skip", "d_in"),
    [(LN, False, D_MODEL), (MID, True, D_MODEL), (Z, True, WIDTH[f"blocks.1.{Z}"])],
)
def test_the_runner_trains_a_transcoder(
    model: Any, hook_in: str, skip: bool, d_in: int, tmp_path: Path
) -> None:
    cfg = runner_config(tmp_path, transcoder_config(skip, d_in=d_in), f"blocks.1.{hook_in}")
    cfg.sae.d_out = D_MODEL
    runner = JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model)
    trained = runner.run()
    sae = SAE.load_from_disk(tmp_path)
    assert type(sae).__name__ == ("JumpReLUSkipTranscoder" if skip else "JumpReLUTranscoder")
    assert sae.cfg.metadata.hook_name == f"blocks.1.{hook_in}"
    assert sae.cfg.metadata.hook_name_out == f"blocks.1.{OUT}"
    x = torch.randn(5, d_in)
    torch.testing.assert_close(sae(x), trained(x), rtol=1e-5, atol=1e-6)
    result = evaluate(model, sae, tiny_tokens())
    # Unit rows start at an FVU of about 2 on this random model; eleven steps do not get far.
    assert 0 < result.fvu < 3
    assert result.hook_out == f"blocks.1.{OUT}"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines and "metrics/explained_variance" in lines[-1]


def test_evaluation_in_the_middle_of_training(model: Any, tmp_path: Path) -> None:
    cfg = runner_config(tmp_path, transcoder_config(skip=True), f"blocks.1.{LN}")
    runner = JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model)
    runner.run()
    # As it was before folding: the same function of scaled rows.
    sae: Any = runner.sae
    raw = SAE.load_from_disk(tmp_path)
    sae.fold_activation_norm_scaling_factor((1 / 0.7, 1 / 3.1))
    folded = folded_copy(sae, (0.7, 3.1))
    for (name, found), (_, expected) in zip(
        folded.state_dict().items(), raw.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)
    scaler: Any = type("Scaler", (), {"scaling_factor": (0.7, 3.1)})()
    found = runner.evaluator(sae, iter(()), scaler)
    assert set(found) == {f"evaluation/{name}" for name in ("delta_loss", "fvu", "l0")}
    assert 0 < found["evaluation/fvu"] < 3
    # A thread that reads ahead waits while the evaluation's hooks are on the model.
    ahead, running = PrefetchingIterator(count()), []
    with model.register_forward_pre_hook(lambda *_: running.append(ahead._lock.locked())):
        assert runner.evaluator(sae, ahead, scaler) == found
    ahead.close()
    assert running and all(running)


def test_the_stock_runner_says_why_it_cannot(model: Any, tmp_path: Path) -> None:
    cfg = runner_config(tmp_path, transcoder_config(), f"blocks.1.{LN}")
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=text(), override_model=model)
    with pytest.raises(ValueError, match="SAELens' own runner reads one hook alone"):
        runner.run()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sae", "changes", "message"),
    [
        ({"hook_name_out": None}, {}, "needs an output hook"),
        ({"hook_name_out": "blocks.1.hook_mlp_uot"}, {}, "did you mean blocks.1.hook_mlp_out"),
        ({"d_out": 31}, {}, "d_out is 31, but .* are 33 wide: set d_out=33"),
        ({"d_in": 31}, {}, "d_in is 31, but .* set d_in=33"),
        ({}, {"hook_name": f"blocks.1.{OUT}"}, "that is an SAE"),
        ({}, {"hook_name": f"blocks.2.{LN}"}, "computed before"),
    ],
)
def test_a_run_that_cannot_work_is_refused(
    model: Any, sae: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = {"d_out": D_MODEL, **sae}
    cfg = runner_config(tmp_path, transcoder_config(**fields), f"blocks.1.{LN}", **changes)
    with pytest.raises(ValueError, match=message):
        JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model)
    assert not any(tmp_path.iterdir())


def test_recipe_flags_make_the_transcoder_s_config() -> None:
    flags = ["--architecture", "jumprelu", *recipes.GEMMA_SCOPE_TRANSCODER.flags()]
    given = ["--d_in", "33", "--d_sae", "59", "--d_out", "37", "--hook_name_out", "blocks.1.x"]
    cfg: Any = _parse_cfg_args([*flags, *given]).sae
    assert type(cfg) is JumpReLUTrainingTranscoderConfig
    assert (cfg.d_in, cfg.d_out, cfg.d_sae) == (33, 37, 59)
    assert cfg.hook_name_out == cfg.metadata.hook_name_out == "blocks.1.x"
    expected = recipes.GEMMA_SCOPE_TRANSCODER.sae_config(33, 59)
    assert cfg.hyperparameter_units == expected.hyperparameter_units == "unit_rms"
    assert cfg.l0_coefficient == expected.l0_coefficient
    assert cfg.apply_b_dec_to_input is False
