"""The training transcoder against closed forms, stock SAELens and itself after a pause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSkipTranscoder, JumpReLUTranscoder
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

import jumprelu_plugin
from jumprelu_plugin.recipes import GEMMA_SCOPE_TRANSCODER
from jumprelu_plugin.saes.parameters import fold_scales_
from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)
from jumprelu_plugin.training.activations.scaler import PairScaler

D_IN, D_OUT, D_SAE, BATCH = 19, 23, 53, 67


def make(skip: bool, **fields: Any) -> JumpReLUTrainingTranscoder:
    config = JumpReLUTrainingSkipTranscoderConfig if skip else JumpReLUTrainingTranscoderConfig
    kind = JumpReLUTrainingSkipTranscoder if skip else JumpReLUTrainingTranscoder
    start = {"target_l0": 5} if "l0_coefficient" not in fields else {}
    widths = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE}
    return kind(config(**{**widths, **start, **fields}))


def batches(count: int, scale_in: float = 1.0, scale_out: float = 1.0) -> list[Tensor]:
    """Rows whose output is a non-linear function of the input, with means away from zero."""
    g = torch.Generator().manual_seed(8)
    mix, out = torch.randn(D_IN, D_IN, generator=g), torch.randn(D_IN, D_OUT, generator=g)
    found = []
    for _ in range(count):
        x = 0.7 + torch.randn(BATCH, D_IN, generator=g) @ mix
        y = 0.3 * torch.tanh(x) @ out - 0.4
        found.append(torch.cat([scale_in * x, scale_out * y], 1))
    return found


def endless(**scales: float) -> Iterator[Tensor]:
    while True:
        yield from batches(11, **scales)


def trainer_for(
    sae: JumpReLUTrainingTranscoder, steps: int, **scales: float
) -> SAETrainer[Any, Any]:
    trainer: SAETrainer[Any, Any] = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=5e-3,
            lr_end=5e-4,
            n_batches_for_norm_estimate=11,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=endless(**scales),
    )
    trainer.activation_scaler = PairScaler(D_IN, D_OUT)
    return trainer


# ---------------------------------------------------------------- the step


def closed_form(sae: Any, x: Tensor, y: Tensor, lam: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of ‖ŷ - y‖² + λL0 with the paper's estimators, written out, in float64."""
    W_enc, b_enc, W_dec, b_dec, theta = (
        getattr(sae, name).detach().double()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    x, y, eps, n = x.double(), y.double(), sae.bandwidth, len(x)
    z = x @ W_enc + b_enc
    gate = (z > theta).double()
    window = (((z - theta) / eps).abs() < 0.5).double()
    a = z * gate
    y_hat = a @ W_dec + b_dec
    if hasattr(sae, "W_skip"):
        y_hat = y_hat + x @ sae.W_skip.detach().double().T
    e = 2 * (y_hat - y) / n
    to_a = e @ W_dec.T
    jump = window * (theta * to_a + lam / n) / eps
    to_z = gate * to_a + (jump if sae.cfg.jumprelu_ste_to_input else 0)
    gradients = {
        "W_enc": x.T @ to_z,
        "b_enc": to_z.sum(0),
        "W_dec": a.T @ e,
        "b_dec": e.sum(0),
        "threshold": -jump.sum(0),
        "W_skip": e.T @ x,
    }
    return (y_hat - y).square().sum(1).mean() + lam * gate.sum(1).mean(), gradients


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("path", ["dense", "sparse", "screened"])
def test_gradients_are_the_closed_form(skip: bool, to_input: bool, path: str) -> None:
    sae = make(
        skip,
        l0_coefficient=0.37,
        jumprelu_bandwidth=0.83,
        jumprelu_init_threshold=0.6,
        jumprelu_ste_to_input=to_input,
        step_kernel=path,
        unit_norm_decoder=False,
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    rows = batches(1)[0]
    output = sae.training_forward_pass(
        TrainStepInput(rows, {"l0": 0.37}, None, n_training_steps=0, is_logging_step=False)
    )
    output.loss.backward()
    loss, gradients = closed_form(sae, rows[:, :D_IN], rows[:, D_IN:], 0.37)
    torch.testing.assert_close(output.loss.detach().double(), loss, rtol=1e-5, atol=0)
    named = dict(sae.named_parameters())
    assert ("W_skip" in named) == skip
    for name, parameter in named.items():
        expected = gradients[name]
        assert parameter.grad is not None and expected.abs().max() > 0
        error = (parameter.grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name
    # What the trainer's metrics compare the output with is the target.
    assert torch.equal(output.sae_in, rows[:, D_IN:])
    assert output.sae_out.shape == (BATCH, D_OUT)


def test_rows_of_one_hook_are_refused() -> None:
    sae = make(False)
    with pytest.raises(ValueError, match=r"19 \+ 23 = 42 wide, and got rows 19.*JumpReLUTraining"):
        sae.training_forward_pass(
            TrainStepInput(batches(1)[0][:, :D_IN], {"l0": 1.0}, None, 0, False)
        )


def test_a_nan_in_the_target_is_reported() -> None:
    rows = batches(1)[0]
    rows[3, -1] = torch.nan
    sae = make(False, l0_coefficient=1.0, jumprelu_bandwidth=0.8, jumprelu_init_threshold=0.6)
    with pytest.raises(ValueError, match="NaN"):
        sae.training_forward_pass(TrainStepInput(rows, {"l0": 1.0}, None, 0, False))


def test_training_starts_at_the_mean_and_aims_the_decoder() -> None:
    sae = make(False, normalize_activations="none", step_kernel="dense")
    rows = batches(1)[0]
    before = sae.W_dec.detach().clone()
    sae.training_forward_pass(TrainStepInput(rows, {"l0": 1.0}, None, 0, False))
    x, y = rows[:, :D_IN], rows[:, D_IN:]
    torch.testing.assert_close(sae.b_dec.detach(), y.mean(0))
    z = x @ sae.W_enc.detach()
    # A threshold is a sample's own value, and rounding decides about that one: leave it out.
    f = (z * (z > sae.threshold * (1 + 1e-5))).detach()
    expected = f.T @ (y - y.mean(0))
    fires = expected.norm(dim=1) > 0
    assert fires.sum() > D_SAE / 2
    torch.testing.assert_close(
        sae.W_dec.detach()[fires],
        torch.nn.functional.normalize(expected[fires], dim=1),
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.equal(sae.W_dec.detach()[~fires], before[~fires])
    assert sae.bandwidth == pytest.approx(2 * z.std().item(), rel=1e-5)


# ---------------------------------------------------------------- scale


def trained(steps: int, skip: bool, **scales: float) -> JumpReLUTrainingTranscoder:
    torch.manual_seed(5)
    sae = make(skip, step_kernel="sparse")
    trainer_for(sae, steps, **scales).fit()
    return sae.eval()


@pytest.mark.parametrize("skip", [False, True])
def test_the_data_s_scale_does_not_matter(skip: bool) -> None:
    """f trained on (αx, βy) is β f(·/α) trained on (x, y).

    Powers of two, so that scaling rounds nothing: a threshold can be a sample's own value, where a
    last bit decides whether a latent fires.
    """
    alpha, beta = 2.0**5, 2.0**-7
    plain = trained(7, skip)
    scaled = trained(7, skip, scale_in=alpha, scale_out=beta)
    x = batches(3)[2][:, :D_IN]
    assert plain.cfg.normalize_activations == scaled.cfg.normalize_activations == "none"
    assert plain(x).std() > 0.1
    torch.testing.assert_close(scaled(alpha * x) / beta, plain(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.encode(alpha * x), plain.encode(x), rtol=1e-6, atol=0)


def test_each_side_has_its_own_root_mean_square() -> None:
    scaler = PairScaler(D_IN, D_OUT)
    data = batches(4, scale_in=3.7, scale_out=0.013)
    scaler.estimate_scaling_factor(D_IN, iter(data), 4)
    scaled = scaler(torch.cat(data))
    for side in scaled.split([D_IN, D_OUT], 1):
        assert side.square().sum(1).mean().item() == pytest.approx(D_IN, rel=1e-5)
    torch.testing.assert_close(scaler.unscale(scaled), torch.cat(data))


def with_massive_outputs(rows: list[Tensor]) -> list[Tensor]:
    """The same rows, one output in every fourth batch 400 times as long; the input tells which."""
    rows = [batch.clone() for batch in rows]
    for batch in rows[::4]:
        batch[7, 5] += 20
        batch[7, D_IN:] *= 400
    return rows


def test_massive_activations_do_not_set_the_scale() -> None:
    usual, massive = PairScaler(D_IN, D_OUT), PairScaler(D_IN, D_OUT)
    usual.estimate_scaling_factor(D_IN, iter(batches(4)), 4)
    massive.estimate_scaling_factor(D_IN, iter(with_massive_outputs(batches(4))), 4)
    assert massive.scaling_factor[0] == pytest.approx(usual.scaling_factor[0], rel=0.02)
    squares = [0.0, 0.0]
    for batch in with_massive_outputs(batches(4)):
        norms = batch[:, D_IN:].norm(dim=1)
        squares[0] += float(norms.clamp_max(10 * norms.median()).square().sum())
        squares[1] += float(norms.square().sum())
    counted, in_full = (4 * BATCH * D_IN / total for total in squares)
    assert massive.scaling_factor[1] ** 2 == pytest.approx(counted, rel=1e-5)
    assert in_full < counted / 100


@pytest.mark.parametrize("bad", [0.0, torch.inf])
def test_a_side_without_a_scale_is_refused(bad: float) -> None:
    rows = batches(1)[0]
    rows[:, D_IN:] = bad
    with pytest.raises(ValueError, match="output hook's activations"):
        PairScaler(D_IN, D_OUT).estimate_scaling_factor(D_IN, iter([rows]), 1)


@pytest.mark.parametrize("skip", [False, True])
def test_folding_moves_the_scales_into_the_weights(skip: bool) -> None:
    sae = make(
        skip, hyperparameter_units="unit_rms", log_threshold=True, jumprelu_init_threshold=0.2
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = batches(1)[0][:, :D_IN]
    scale_in, scale_out = 0.31, 7.9
    expected, acts = sae(scale_in * x).detach() / scale_out, sae.encode(scale_in * x).detach()
    assert 0 < (acts > 0).float().mean() < 1
    sae.fold_activation_norm_scaling_factor((scale_in, scale_out))
    torch.testing.assert_close(sae(x).detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x).detach(), acts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_stock_objects_fold_alike(skip: bool) -> None:
    kind = JumpReLUSkipTranscoder if skip else JumpReLUTranscoder
    config = JumpReLUSkipTranscoderConfig if skip else JumpReLUTranscoderConfig
    cfg = config(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, apply_b_dec_to_input=False)
    stock: Any = kind(cfg)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    x = batches(1)[0][:, :D_IN]
    expected = stock(0.31 * x).detach() / 7.9
    fold_scales_(stock, 0.31, 7.9)
    torch.testing.assert_close(stock(x).detach(), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what is saved

KINDS = {
    f"{unit}-{theta}-{rows}-{'skip' if skip else 'plain'}": (unit, theta, rows, skip)
    for unit, theta, rows, skip in product(
        ("sqrt_d", "unit_rms"), ("raw", "log"), ("free", "unit_norm"), (False, True)
    )
}


def of_kind(kind: str, **fields: Any) -> JumpReLUTrainingTranscoder:
    unit, theta, rows, skip = KINDS[kind]
    torch.manual_seed(5)
    return make(
        skip,
        hyperparameter_units=unit,
        log_threshold=theta == "log",
        unit_norm_decoder=rows == "unit_norm",
        decoder_init_norm=1.0,
        step_kernel="sparse",
        **fields,
    )


READER = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae_lens import SAE
root = Path(sys.argv[1])
x = load_file(root / "x.safetensors")["x"]
out = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    sae = SAE.load_from_disk(folder)
    expected = "JumpReLUSkipTranscoder" if folder.name.endswith("skip") else "JumpReLUTranscoder"
    assert type(sae).__name__ == expected, type(sae)
    assert sae.cfg.metadata.hook_name_out == "blocks.7.hook_mlp_out"
    out[folder.name + "/acts"] = sae.encode(x).detach().contiguous()
    out[folder.name + "/y_hat"] = sae(x).detach().contiguous()
assert not [m for m in sys.modules if m.startswith("jumprelu_plugin")]
save_file(out, root / "read.safetensors")
"""


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, JumpReLUTrainingTranscoder]]:
    root = tmp_path_factory.mktemp("saved")
    saes = {kind: of_kind(kind, hook_name_out="blocks.7.hook_mlp_out") for kind in KINDS}
    for name, sae in saes.items():
        trainer_for(sae, 5, scale_in=3.1, scale_out=0.2).fit()
        sae.save_inference_model(root / name)
    save_file({"x": batches(3, scale_in=3.1)[2][:, :D_IN].contiguous()}, root / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(root)],
        capture_output=True,
        text=True,
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return root, saes


@pytest.mark.parametrize("name", KINDS)
def test_stock_reads_the_same_transcoder(
    saved: tuple[Path, dict[str, JumpReLUTrainingTranscoder]], name: str
) -> None:
    root, saes = saved
    read, sae = load_file(root / "read.safetensors"), saes[name].eval()
    x = load_file(root / "x.safetensors")["x"]
    acts = sae.encode(x).detach()
    assert 0 < (acts > 0).float().mean() < 0.8
    assert torch.equal(read[f"{name}/acts"] > 0, acts > 0)
    torch.testing.assert_close(read[f"{name}/acts"], acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[f"{name}/y_hat"], sae(x).detach(), rtol=1e-5, atol=1e-6)
    folder = root / name
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == sae.cfg.architecture()
    assert cfg["d_out"] == D_OUT and cfg["normalize_activations"] == "none"
    shapes = {n: tuple(v.shape) for n, v in load_file(folder / "sae_weights.safetensors").items()}
    expected = {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_OUT),
        "b_dec": (D_OUT,),
        "threshold": (D_SAE,),
    }
    assert shapes == {**expected, **({"W_skip": (D_OUT, D_IN)} if "skip" in name else {})}


def mid_training(kind: str) -> tuple[JumpReLUTrainingTranscoder, SAETrainer[Any, Any]]:
    sae = of_kind(kind)
    trainer = trainer_for(sae, 9)
    trainer.activation_scaler.estimate_scaling_factor(D_IN, trainer.data_provider, 11)
    for _ in range(4):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    return sae, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    sae, trainer = mid_training(kind)
    trainer.save_checkpoint("here", base_path=tmp_path)
    resumed = of_kind(kind)
    again = trainer_for(resumed, 9)
    resumed.load_weights_from_checkpoint(tmp_path / "here")
    again.load_trainer_state(tmp_path / "here")
    assert again.activation_scaler.scaling_factor == trainer.activation_scaler.scaling_factor
    for _ in range(4):
        next(again.data_provider)
    trainer.fit()
    again.fit()
    assert again.n_training_steps == trainer.n_training_steps == 9
    for (name, found), (_, expected) in zip(
        resumed.state_dict().items(), sae.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_fine_tuning_keeps_loaded_weights(tmp_path: Path) -> None:
    sae, _ = mid_training("sqrt_d-raw-unit_norm-skip")
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, JumpReLUTrainingSkipTranscoder)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    trainer = trainer_for(loaded, 1)
    trainer.step(next(trainer.data_provider))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        change = (loaded.state_dict()[name] - before[name]).abs().max()
        assert 0 < change < 0.01, name  # one step of Adam at 5e-3, renormalised


@pytest.mark.parametrize("kind", ["sqrt_d-raw-unit_norm-plain", "unit_rms-log-free-skip"])
def test_an_unfolded_transcoder_is_not_saved_for_use(kind: str, tmp_path: Path) -> None:
    sae, trainer = mid_training(kind)
    with pytest.raises(ValueError, match=r"expect scaled inputs.*activation_scaler\.json"):
        sae.save_inference_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What the message says to do.
    trainer.save_checkpoint("here", base_path=tmp_path)
    scales = json.loads((tmp_path / "here" / "activation_scaler.json").read_text())
    sae.fold_activation_norm_scaling_factor(tuple(scales["scaling_factor"]))
    sae.save_inference_model(tmp_path / "out")


# ---------------------------------------------------------------- configs, recipe, registration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations"),
        ({"d_out": 0}, "d_out is 0"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"target_l0": None}, "target_l0"),
    ],
)
def test_a_config_that_cannot_train_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(False, **fields)


def test_both_architectures_are_registered_for_training_alone() -> None:
    stock = dict(SAE_CLASS_REGISTRY)
    names = ("jumprelu_transcoder", "jumprelu_skip_transcoder")
    jumprelu_plugin.unregister()
    try:
        assert not any(name in SAE_TRAINING_CLASS_REGISTRY for name in names)
    finally:
        jumprelu_plugin.register()
    ours = [SAE_TRAINING_CLASS_REGISTRY[name][0] for name in names]
    assert ours == [JumpReLUTrainingTranscoder, JumpReLUTrainingSkipTranscoder]
    assert stock == SAE_CLASS_REGISTRY


def test_gemma_scope_s_recipe() -> None:
    cfg = GEMMA_SCOPE_TRANSCODER.sae_config(D_IN, D_SAE, d_out=D_OUT)
    sae = JumpReLUTrainingTranscoder(cfg)
    assert sae.bandwidth == pytest.approx(0.001 * D_IN**0.5)
    torch.testing.assert_close(sae.threshold.detach(), torch.full((D_SAE,), 0.001 * D_IN**0.5))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    square = JumpReLUTrainingTranscoder(GEMMA_SCOPE_TRANSCODER.sae_config(D_IN, D_SAE))
    assert not torch.allclose(square.W_enc, square.W_dec.T, atol=0.1)  # not a transposed start
    step = TrainStepInput(batches(1)[0], {"l0": cfg.l0_coefficient or 0.0}, None, 0, False)
    sae.training_forward_pass(step).loss.backward()
    assert sae.b_dec.count_nonzero() == 0  # no data-dependent start
    assert sae.control.l0 is None
