"""Finetuning starts with the pretrained function exactly, and ends in its units.

The oracle is stock SAELens' inference SAE on raw activations: it knows no scale and no training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import TrainStepInput

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.finetune.pretrained import load_parameters_, read_pretrained, rescale
from jumprelu_plugin.finetune.runner import FinetuningRunner, pretrained_flags
from jumprelu_plugin.saes.parameters import Parameters
from tests.tiny import D_MODEL, RESIDUAL, Tiny, tiny_models, tiny_sae, tiny_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
D_SAE, BATCH, CONTEXT = 41, 53, 13
SCALE = 0.37


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_models(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def text() -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(211, CONTEXT, seed=7).tolist()})


def pretrained_sae(subtracts: bool) -> Any:
    """Free decoder norms, and one threshold of 0."""
    sae = tiny_sae()
    sae.cfg.apply_b_dec_to_input = subtracts
    with torch.no_grad():
        sae.threshold[7] = 0
    return sae


def config(output: Path | None, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    of_sae = {f: fields.pop(f) for f in list(fields) if f in SAE_FIELDS}
    sae = JumpReLUTrainingSAEConfig(d_in=1, d_sae=1, step_kernel="sparse", **of_sae)
    given = {"training_tokens": 6 * BATCH, "lr": 1e-3, "checkpoint_path": None, **fields}
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny-gemma-2-test",
        hook_name=given.pop("hook_name", RESIDUAL),
        train_batch_size_tokens=BATCH,
        context_size=CONTEXT,
        store_batch_size_prompts=5,
        n_batches_in_buffer=20,
        n_batches_for_norm_estimate=5,
        output_path=None if output is None else str(output),
        logger=LoggingConfig(log_to_wandb=False),
        **given,
    )


SAE_FIELDS = {f.name for f in dataclasses.fields(JumpReLUTrainingSAEConfig)}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("rows", ["unit_norm", "free"])
@pytest.mark.parametrize("units", ["sqrt_d", "unit_rms"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_the_first_step_computes_what_the_pretrained_sae_does(
    subtracts: bool, rows: Any, units: Any, path: Any
) -> None:
    sae = pretrained_sae(subtracts)
    with torch.no_grad():
        sae.W_dec[5] = 0  # a latent that adds nothing
    parameters = Parameters.of(sae)
    cfg = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        target_l0=7,
        unit_norm_decoder=rows == "unit_norm",
        hyperparameter_units=units,
        step_kernel=path,
        apply_b_dec_to_input=subtracts,
        log_threshold=units == "unit_rms",
    )
    training = JumpReLUTrainingSAE(cfg)
    moved = rescale(parameters, SCALE, unit_rows=cfg.resolve().unit_norm_decoder)
    load_parameters_(training, moved)
    x = 3 * torch.randn(61, D_MODEL)
    step = training.training_forward_pass(
        TrainStepInput(
            sae_in=SCALE * x,
            coefficients={"l0": 1.0},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    acts = sae.encode(x)
    torch.testing.assert_close(step.sae_out / SCALE, sae.decode(acts), rtol=1e-4, atol=1e-4)
    assert torch.equal(step.feature_acts.to_dense() > 0, acts > 0)
    # Calibration found a bandwidth and left the thresholds alone.
    assert training.bandwidth is not None and training.bandwidth > 0
    torch.testing.assert_close(training.threshold, moved.threshold)
    # Latents are in units of what they add to the scaled input.
    norms = sae.W_dec.norm(dim=1) if rows == "unit_norm" else torch.ones(D_SAE)
    latents = SCALE * norms * acts
    others = torch.arange(D_SAE) != 5  # a row of zeros has no norm to count in
    found = step.feature_acts.to_dense()[:, others]
    torch.testing.assert_close(found, latents[:, others], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_a_run_that_learns_nothing_gives_the_folder_back(
    subtracts: bool, normalize: Any, tiny: Tiny, text: Dataset, tmp_path: Path
) -> None:
    sae = pretrained_sae(subtracts)
    sae.save_model(tmp_path / "released")
    cfg = config(
        tmp_path / "out",
        lr=1e-30,
        l0_coefficient=0.3,
        unit_norm_decoder=True,
        normalize_activations=normalize,
    )
    runner = FinetuningRunner(tmp_path / "released", cfg, text, tiny.hooked)
    runner.run()
    back = SAE.load_from_disk(tmp_path / "out")
    assert back.cfg.apply_b_dec_to_input == subtracts
    assert back.cfg.metadata.finetuned_from == str(tmp_path / "released")
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=2e-5, atol=1e-6)
    assert runner.initial_metrics is not None and runner.initial_metrics.target_l0 is None
    assert (runner.initial_metrics.scale is None) == (normalize == "none")


def test_l0_at_the_start_is_stock_saelens_and_is_the_target(
    tiny: Tiny, text: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae = pretrained_sae(True)
    sae.save_model(tmp_path / "released")
    said: list[str] = []
    runner = FinetuningRunner(
        tmp_path / "released", config(tmp_path / "out"), text, tiny.hooked, log=said.append
    )
    seen: list[torch.Tensor] = []
    take = runner.activations_store.__next__

    def watched(self: Any) -> torch.Tensor:
        seen.append(take())
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runner.activations_store), "__next__", watched)
        trained = runner.run()
    x = torch.cat(seen[:4])
    l0 = float((sae.encode(x) > 0).sum()) / len(x)
    error = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert runner.initial_metrics is not None
    assert runner.initial_metrics.l0 == pytest.approx(l0, rel=1e-6)
    assert runner.initial_metrics.fvu == pytest.approx(error, rel=1e-4)
    assert (
        runner.initial_metrics.target_l0 == runner.initial_metrics.l0 == trained.control.l0.target
    )
    mean_norm = torch.cat(seen[:5]).norm(dim=1).mean()
    assert runner.initial_metrics.scale == pytest.approx(D_MODEL**0.5 / float(mean_norm), rel=1e-5)
    assert len(said) == 1 and f"{l0:.4g}" in said[0]
    assert "rule for a run of this size" not in caplog.text  # which is for new weights


def test_one_config_finetunes_several_dictionaries(
    tiny: Tiny, text: Dataset, tmp_path: Path
) -> None:
    """Each is held at its own L0: what is given is not written into."""
    given, targets = config(tmp_path / "out"), []
    for threshold in (0.1, 3.7):
        sae = pretrained_sae(True)
        sae.threshold.data.fill_(threshold)
        sae.save_model(tmp_path / str(threshold))
        given.output_path = str(tmp_path / "out" / str(threshold))
        runner = FinetuningRunner(tmp_path / str(threshold), given, text, tiny.hooked)
        runner.run()
        assert runner.initial_metrics is not None
        targets.append(runner.initial_metrics.target_l0)
        assert given.sae.target_l0 is None
    assert targets[0] > 1.2 * targets[1]


def test_training_lowers_the_error_and_keeps_l0(tiny: Tiny, text: Dataset, tmp_path: Path) -> None:
    _, cache = tiny.hooked.run_with_cache(tiny_tokens(101, CONTEXT, seed=23))
    x = cache[RESIDUAL].flatten(0, 1)
    before = tiny_sae(d_sae=97)
    with torch.no_grad():  # an untrained dictionary with a sensible start
        before.W_dec.div_(before.W_dec.norm(dim=1, keepdim=True))
        before.W_enc.copy_(before.W_dec.T)
        before.b_enc.zero_()
        before.b_dec.copy_(x.mean(0))
        before.threshold.fill_(float(((x - x.mean(0)) @ before.W_enc).quantile(0.9)))
        before.W_dec.mul_(torch.linspace(0.3, 1.7, 97)[:, None])
    before.save_model(tmp_path / "released")
    cfg = config(tmp_path / "out", training_tokens=60 * BATCH, lr=1e-2)
    runner = FinetuningRunner(tmp_path / "released", cfg, text, tiny.hooked)
    runner.run()
    after = SAE.load_from_disk(tmp_path / "out")
    error = [float((sae(x) - x).square().sum()) for sae in (before, after)]
    assert error[1] < 0.7 * error[0]
    assert runner.initial_metrics is not None and 7 < runner.initial_metrics.l0 < 12
    l0 = float((after.encode(x) > 0).sum()) / len(x)
    assert l0 == pytest.approx(runner.initial_metrics.l0, rel=0.06)
    torch.testing.assert_close(after.W_dec.norm(dim=1), before.W_dec.norm(dim=1))


def test_resumed_it_ends_where_the_whole_run_does(
    tiny: Tiny, text: Dataset, tmp_path: Path
) -> None:
    pretrained_sae(False).save_model(tmp_path / "released")

    def run(name: str, **fields: Any) -> Any:
        cfg = config(tmp_path / name, checkpoint_path=str(tmp_path / "checkpoints"), **fields)
        return FinetuningRunner(tmp_path / "released", cfg, text, tiny.hooked).run()

    whole = run("whole", n_checkpoints=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    target = whole.control.l0.target
    with pytest.raises(ValueError, match=rf"target_l0 is 12, and .* {target:.3f}.*leave target_l0"):
        run("other", resume_from_checkpoint=str(checkpoint), target_l0=12)
    for given in ({}, {"target_l0": target}):
        resumed = run(f"resumed{len(given)}", resume_from_checkpoint=str(checkpoint), **given)
        assert resumed.control.l0.target == target
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name


def test_gemma_scope_file(tiny: Tiny, text: Dataset, tmp_path: Path) -> None:
    arrays = gemma_scope_arrays()
    np.savez(tmp_path / "params.npz", **arrays)
    runner = FinetuningRunner(tmp_path / "params.npz", config(tmp_path / "out"), text, tiny.hooked)
    assert (runner.cfg.sae.d_in, runner.cfg.sae.d_sae) == (D_MODEL, D_SAE)
    assert not runner.cfg.sae.apply_b_dec_to_input
    runner.run()
    assert SAE.load_from_disk(tmp_path / "out").cfg.metadata.hook_name == RESIDUAL


def gemma_scope_arrays() -> dict[str, Any]:
    tensors = Parameters.of(pretrained_sae(False)).tensors()
    return {name: value.numpy() for name, value in tensors.items()}


def test_flags_from_the_folder_and_what_it_does_not_say(tmp_path: Path) -> None:
    pretrained_sae(True).save_model(tmp_path / "sae")
    said = pretrained_flags(tmp_path / "sae", [])
    assert said == [
        f"--d_in={D_MODEL}",
        f"--d_sae={D_SAE}",
        f"--hook_name={RESIDUAL}",
        "--model_name=tiny-gemma-2-test",
    ]
    for flags, message in (
        (["--d_sae", "64"], f"--d_sae is 64, and the dictionary in .* has {D_SAE}"),
        ([f"--d_in={D_MODEL}", "--apply_b_dec_to_input=false"], "apply_b_dec_to_input is false"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained_flags(tmp_path / "sae", flags)
    assert pretrained_flags(tmp_path / "sae", [f"--d_sae={D_SAE}"]) == said
    trained = pretrained_sae(True)
    recorded = {
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {"n_devices": 2},
        "dataset_path": "some/text",
        "context_size": 31,
        "prepend_bos": False,
        "seqpos_slice": (-5, None),
    }
    for name, value in recorded.items():
        trained.cfg.metadata[name] = value
    trained.save_model(tmp_path / "recorded")
    more = pretrained_flags(tmp_path / "recorded", [])
    cfg = parse_flags([*more, "--context_size", "17"])
    assert {name: getattr(cfg, name) for name in recorded} == recorded | {"context_size": 17}
    other = pretrained_flags(tmp_path / "recorded", ["--model_name", "other"])
    assert not any(flag.startswith("--model_class_name") for flag in other)
    trained.cfg.metadata.sequence_separator_token = None
    trained.cfg.metadata.disable_concat_sequences = True
    trained.save_model(tmp_path / "apart")
    cfg = parse_flags(pretrained_flags(tmp_path / "apart", []))
    assert cfg.sequence_separator_token is None and cfg.disable_concat_sequences
    trained.cfg.metadata.dataset_path = ""  # rows of the demo extra, which are made already
    trained.save_model(tmp_path / "demo")
    cfg = parse_flags(pretrained_flags(tmp_path / "demo", []))
    assert cfg.sequence_separator_token == "bos" and not cfg.disable_concat_sequences
    np.savez(tmp_path / "params.npz", **gemma_scope_arrays())
    with pytest.raises(ValueError, match="give --hook_name"):
        pretrained_flags(tmp_path / "params.npz", ["--model_name=x"])
    assert pretrained_flags(tmp_path / "params.npz", ["--model_name=x", "--hook_name", "y"])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("threshold"), "expected"),
        (lambda a: a["W_dec"].__setitem__((3, 2), np.nan), "NaN"),
        (lambda a: a["threshold"].__setitem__(3, -0.1), "1 of 41 thresholds are negative"),
        (lambda a: a.__setitem__("b_enc", a["b_enc"][:-2]), "b_dec|b_enc"),
    ],
)
def test_broken_arrays_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    arrays = {name: value.copy() for name, value in gemma_scope_arrays().items()}
    change(arrays)
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        read_pretrained(tmp_path / "params.npz", hook_name=RESIDUAL)


def test_wrong_width_source_and_settings_are_refused(
    tiny: Tiny, text: Dataset, tmp_path: Path
) -> None:
    tiny_sae(d_in=29).save_model(tmp_path / "narrow")
    with pytest.raises(ValueError, match="29 wide, and those at .* are 33 wide"):
        FinetuningRunner(tmp_path / "narrow", config(None), text, tiny.hooked)
    with pytest.raises(FileNotFoundError, match="there is no"):
        FinetuningRunner(tmp_path / "nothing", config(None), text, tiny.hooked)
    tiny_sae().save_model(tmp_path / "sae")
    with pytest.raises(ValueError, match="did you mean"):
        cfg = config(None, hook_name="blocks.1.hook_resid_pots")
        FinetuningRunner(tmp_path / "sae", cfg, text, tiny.hooked)
    with pytest.raises(ValueError, match="layer_norm"):
        cfg = config(None, normalize_activations="layer_norm")
        FinetuningRunner(tmp_path / "sae", cfg, text, tiny.hooked)
    with pytest.raises(ValueError, match="from_pretrained_path is nowhere, .*leave it out"):
        cfg = config(None, from_pretrained_path="nowhere")
        FinetuningRunner(tmp_path / "sae", cfg, text, tiny.hooked)
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="not a dictionary's file"):
        read_pretrained(tmp_path / "other.npz")


def test_a_dictionary_of_another_hook_is_warned_of(
    tiny: Tiny, text: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae = tiny_sae()
    with torch.no_grad():
        sae.threshold.fill_(1e4)
    sae.save_model(tmp_path / "silent")
    with pytest.raises(ValueError, match="no latent of .* fires"):
        FinetuningRunner(tmp_path / "silent", config(None), text, tiny.hooked).run()
    with torch.no_grad():
        sae.threshold.fill_(0.1)
        sae.W_dec *= 30
    sae.save_model(tmp_path / "foreign")
    with caplog.at_level("WARNING", logger="sae_lens"):
        FinetuningRunner(tmp_path / "foreign", config(None), text, tiny.hooked).run()
    assert "worse than their mean" in caplog.text
