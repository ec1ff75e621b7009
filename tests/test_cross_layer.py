"""The cross-layer transcoder: gradients, causality, training, folder, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from dictionaries import needs
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file, save_file
from tiny import BOS, D_MODEL, N_LAYERS, tiny_hf, tiny_hooked, tiny_tokenizer, tiny_tokens
from torch import Tensor
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.formats import circuit_tracer, circuit_tracer_clt, export
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL
from jumprelu_plugin.transcoders.clt import (
    CLTConfig,
    CLTTrainingConfig,
    CrossLayerTranscoder,
    evaluate_clt,
    load_clt,
    run,
    save_clt,
)
from jumprelu_plugin.transcoders.clt.memory import parameter_count
from jumprelu_plugin.transcoders.clt.run import CLTSettings, train_clt
from jumprelu_plugin.transcoders.clt.trainer import Trainer
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")
D_IN, D_OUT, D_SAE, LAYERS, BATCH = 13, 11, 53, 3, 37
POSITIONS = 17
LN, OUT = "blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"


def random_clt(
    d_in: int = D_IN, d_out: int = D_OUT, *, seed: int = 3, **fields: Any
) -> CrossLayerTranscoder:
    """Random parameters; thresholds from 0.3 to 1.3, on z of spread about 1."""
    cfg = CLTConfig(d_in, d_out, D_SAE, tuple(range(LAYERS)), **fields)
    model = CrossLayerTranscoder(cfg)
    generator = torch.Generator().manual_seed(seed)
    scales = {"W_enc": d_in**-0.5, "W_dec": 0.2, "b_enc": 0.3, "b_dec": 0.7}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind == "threshold":
                parameter.copy_(0.3 + torch.rand(parameter.shape, generator=generator))
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scales[kind] * noise)
    return model


def random_batch(seed: int = 5, batch: int = BATCH) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, D_IN, generator=generator) for _ in range(LAYERS)]
    return inputs, [torch.randn(batch, D_OUT, generator=generator) + 0.3 for _ in range(LAYERS)]


# ---------------------------------------------------------------- the step


def reference_loss(
    model: CrossLayerTranscoder,
    inputs: list[Tensor],
    targets: list[Tensor],
    bandwidths: list[float],
    coefficients: list[float],
    mode: str,
    to_input: bool,
) -> Tensor:
    """The definition, dense, with a matrix for every pair of layers and estimators by detaching."""
    outputs = [source.b_dec.expand(len(inputs[0]), D_OUT) for source in model.sources]
    penalty = torch.zeros(())
    for index, source in enumerate(model.sources):
        theta, epsilon = source.threshold, bandwidths[index]
        z = inputs[index] @ source.W_enc + source.b_enc
        reach = z if to_input else z.detach()
        window = ((z - theta).abs() < epsilon / 2).float()
        slope = window * ((reach - theta) - (reach - theta).detach()) / epsilon  # 0, with gradient
        gates = (z > theta).float() + slope
        f = z * (z > theta) + theta.detach() * slope
        pairs = source.W_dec.reshape(D_SAE, source.later, D_OUT)
        for later in range(source.later):
            outputs[index + later] = outputs[index + later] + f @ pairs[:, later]
        norms = pairs.square().sum((1, 2)).sqrt()
        costs = gates if mode == "step" else torch.tanh(1.7 * f * norms)
        penalty = penalty + coefficients[index] * costs.sum(1).mean()
    errors = [(y - found).square().sum(1).mean() for y, found in zip(targets, outputs, strict=True)]
    return torch.stack(errors).sum() + penalty


@pytest.mark.parametrize("path", ["sparse", "screened", "dense"])
@pytest.mark.parametrize(
    ("mode", "to_input"), [("step", True), ("step", False), ("tanh", True), ("tanh", False)]
)
def test_gradients_are_the_definition_s(path: str, mode: Any, to_input: bool) -> None:
    inputs, targets = random_batch()
    bandwidths = [0.7, 1.1, 0.4]
    cfg = CLTTrainingConfig(
        l0_coefficient=0.23,
        jumprelu_sparsity_loss_mode=mode,
        jumprelu_tanh_scale=1.7,
        jumprelu_ste_to_input=to_input,
        step_kernel=path,  # type: ignore[arg-type]
    )
    model = random_clt()
    training_step = CLTTrainingStep(model, cfg)
    set_bandwidths(training_step, bandwidths)
    loss = training_step.loss(inputs, targets).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = reference_loss(model, inputs, targets, bandwidths, [0.23] * LAYERS, mode, to_input)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_layer_writes_to_itself_and_later_layers_only() -> None:
    model = random_clt()
    x = torch.stack(random_batch()[0])
    before = model(x)
    for layer in range(LAYERS):
        changed = x.clone()
        changed[layer] += 0.5
        difference = (model(changed) - before).abs().amax((1, 2))
        assert (difference[:layer] == 0).all()
        assert (difference[layer:] > 1e-2).all()


def test_it_is_what_a_matrix_for_each_pair_of_layers_gives() -> None:
    model = random_clt()
    x = torch.stack(random_batch()[0])
    latents, outputs = model.encode(x), model(x)
    for m, target in enumerate(model.sources):
        expected = target.b_dec.expand(BATCH, D_OUT)
        for layer in range(m + 1):
            source = model.sources[layer]
            z = x[layer] @ source.W_enc + source.b_enc
            f = torch.where(z > source.threshold, z, 0.0)
            torch.testing.assert_close(latents[layer], f)
            columns = slice((m - layer) * D_OUT, (m - layer + 1) * D_OUT)
            expected = expected + f @ source.W_dec[:, columns]
        torch.testing.assert_close(outputs[m], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="got 2 layers.*has 3"):
        model(x[:2])


def test_folding_is_exact() -> None:
    scaled, raw = random_clt().double(), random_clt().double()
    scales = [(0.7, 3.1), (1.9, 0.2), (5.3, 1.3)]
    raw.fold_scales_(scales)
    x = torch.stack(random_batch()[0]).double()
    s_in, s_out = (torch.tensor(side, dtype=torch.float64)[:, None, None]
                   for side in zip(*scales, strict=True))  # fmt: skip
    torch.testing.assert_close(raw(x), scaled(x * s_in) / s_out, rtol=1e-12, atol=1e-12)
    assert torch.equal(raw.sources[1].threshold, scaled.sources[1].threshold)
    with pytest.raises(ValueError, match="2 pairs of scales for 3 layers"):
        raw.fold_scales_(scales[:2])
    with pytest.raises(ValueError, match="scale is 0"):
        raw.fold_scales_([(1.0, 0.0), *scales[1:]])


# ---------------------------------------------------------------- training on rows


def structured(batch: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sparse causes that a layer sees and that its own and all later outputs depend on."""
    fixed = torch.Generator().manual_seed(11)
    mix = torch.randn(LAYERS, 29, D_IN, generator=fixed)
    out = torch.randn(LAYERS, LAYERS, 29, D_OUT, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    causes = torch.rand(LAYERS, batch, 29, generator=generator)
    causes = causes * (torch.rand(LAYERS, batch, 29, generator=generator) < 0.1)
    inputs = [causes[layer] @ mix[layer] for layer in range(LAYERS)]
    targets = [
        torch.stack([causes[layer] @ out[layer, m] for layer in range(m + 1)]).sum(0)
        for m in range(LAYERS)
    ]
    return inputs, targets


def set_bandwidths(training_step: CLTTrainingStep, bandwidths: list[float]) -> None:
    """As a checkpoint would: nothing is calibrated then."""
    state = training_step.state()
    for control, bandwidth in zip(state["controls"], bandwidths, strict=True):
        control["bandwidth"] = bandwidth
    training_step.load_state(state, training_step.tensors())


def trained(
    steps: int, **fields: Any
) -> tuple[CLTTrainingStep, list[list[float]], list[list[float]]]:
    model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
    training_step = CLTTrainingStep(model, CLTTrainingConfig(step_kernel="sparse", **fields))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    l0, fvu = [], []
    for step in range(steps):
        output = training_step.loss(*structured(211, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        l0.append(output.l0)
        fvu.append(output.fvu(LAYERS))
    return training_step, l0, fvu


@pytest.mark.parametrize("mode", ["step", "tanh"])
def test_each_layer_lands_on_the_l0_asked_for(mode: str) -> None:
    training_step, l0, fvu = trained(240, target_l0=5.0, jumprelu_sparsity_loss_mode=mode)
    last = torch.tensor(l0[-60:]).mean(0)
    assert ((last - 5).abs() < 0.5).all(), last
    assert max(fvu[-1]) < 0.5 * min(fvu[0]) and max(fvu[-1]) < 0.4
    coefficients = [float(control.multiplier) for control in training_step.controls]
    assert min(coefficients) > 0 and len(set(coefficients)) == LAYERS
    for source in training_step.model.sources:
        torch.testing.assert_close(source.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert (source.threshold >= 0).all()


def test_a_fixed_coefficient_warms_up_and_a_higher_one_is_sparser() -> None:
    sparse, dense = (
        torch.tensor(trained(80, l0_coefficient=c, l0_warm_up_steps=20)[1])[-10:].mean()
        for c in (0.5, 0.005)
    )
    assert sparse < 0.8 * dense
    training_step = trained(7, l0_coefficient=0.5, l0_warm_up_steps=20)[0]
    assert training_step._coefficients() == [0.5 * 8 / 20] * LAYERS


def test_cross_layer_decoders_carry_what_a_layer_s_own_input_cannot() -> None:
    """The last output also depends on earlier layers' causes: cutting those decoders costs."""
    training_step = trained(240, target_l0=5.0)[0]
    inputs, targets = structured(499, 10_001)
    model = training_step.model
    whole = (model(torch.stack(inputs))[2] - targets[2]).square().sum()
    for source in model.sources:
        source.W_dec.data[:, D_OUT:] = 0
    cut = (model(torch.stack(inputs))[2] - targets[2]).square().sum()
    assert cut > 2 * whole


def test_an_outlier_counts_less_at_the_output_that_has_it() -> None:
    inputs, targets = structured(101, 7)
    targets[1][13] *= 150
    torch.manual_seed(3)
    model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
    # A fixed penalty of 0 leaves the error alone.
    cfg = CLTTrainingConfig(l0_coefficient=0.0, step_kernel="sparse", outlier_norm_ratio=4.0)
    training_step = CLTTrainingStep(model, cfg)
    output = training_step.loss(inputs, targets)
    expected = 0.0
    for y, y_hat in zip(targets, output.output.split(D_OUT, 1), strict=True):
        norm = y.norm(dim=1)
        worth = (4 * norm.median() / norm).clamp(max=1).square()
        expected += float((worth * (y_hat - y).square().sum(1)).sum()) / 101
    assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    full = float((output.output - output.target).square().sum()) / 101
    assert full > 20 * expected


def test_an_outlier_in_the_first_batch_moves_no_bias_and_no_bandwidth() -> None:
    inputs, targets = structured(211, 7)
    wild = [y.clone() for y in targets]
    wild[2][13] *= 150
    usual = torch.arange(211) != 13
    found = []
    for x, y in ((inputs, wild), ([a[usual] for a in inputs], [b[usual] for b in targets])):
        torch.manual_seed(3)
        model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
        cfg = CLTTrainingConfig(target_l0=5.0, step_kernel="sparse", outlier_norm_ratio=10.0)
        training_step = CLTTrainingStep(model, cfg)
        training_step.loss(x, y)
        found.append(
            [
                *(c.bandwidth or 0.0 for c in training_step.controls),
                *(float(s.b_dec.sum()) for s in model.sources),
            ]
        )
        found[-1] += [float(s.W_dec.sum()) for s in model.sources]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_density_limit_holds_in_every_layer() -> None:
    def densities(**fields: Any) -> Tensor:
        torch.manual_seed(3)
        training_step = trained(240, target_l0=5.0, **fields)[0]
        inputs, _ = structured(1009, 999)
        layers = zip(training_step.model.sources, inputs, strict=True)
        return torch.stack([(s.encode(x) > 0).float().mean(0) for s, x in layers])

    without, limited = densities(), densities(max_latent_density=0.2)
    assert without.max() > 0.35
    assert limited.max() < 0.25
    torch.testing.assert_close(limited.sum(1), torch.full((LAYERS,), 5.0), rtol=0.05, atol=0)


def test_dead_latents_of_any_layer_start_again() -> None:
    model = CrossLayerTranscoder(CLTConfig(D_IN, D_OUT, D_SAE, tuple(range(LAYERS))))
    training_step = CLTTrainingStep(model, CLTTrainingConfig(target_l0=5.0, step_kernel="sparse"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Looked for every 12 steps, and dead after as many: found at the second look.
    for step in range(30):
        if step == 1:
            for index, source in enumerate(model.sources):
                source.b_enc.data[index : index + 3] = -100.0
        if step == 11:
            assert training_step.dead_share() == 0.0
        if step == 20:
            assert training_step.dead_share() >= 3 / D_SAE
        output = training_step.loss(*structured(211, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for index, source in enumerate(model.sources):
        assert (source.b_enc[index : index + 3] > -50).all()
        firing = training_step.controls[index].firing
        assert firing is not None and (firing.silent[index : index + 3] < 10).all()
    assert training_step.dead_share() == 0.0


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tiny_hooked(tiny_hf(), tokenizer)


def text(sequences: int = 97) -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(sequences, POSITIONS).tolist()})


def settings(**changes: Any) -> CLTSettings:
    fields: dict[str, Any] = {
        "model_name": "tiny-gemma-2-test",
        "d_sae": 59,
        "target_l0": 7.0,
        "training_tokens": 13 * 41,
        "train_batch_size_tokens": 41,
        "context_size": POSITIONS,
        "store_batch_size_prompts": 5,
        "n_batches_in_buffer": 13,
        "n_batches_for_norm_estimate": 3,
        "n_checkpoints": 3,
        "lr": 3e-3,
        "step_kernel": "sparse",
    }
    return CLTSettings(**{**fields, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.stem}/{name}": value
        for path in sorted(folder.glob("layer_*"))
        for name, value in load_file(path).items()
    }


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put a step's number in the list: after it, the process is sent SIGINT, as by Ctrl-C."""
    steps: list[int] = []
    show = Trainer._show

    def wrapped(self: Trainer, *args: Any) -> None:
        if self.step in steps:
            signal.raise_signal(signal.SIGINT)
        show(self, *args)

    monkeypatch.setattr(Trainer, "_show", wrapped)
    before = signal.getsignal(signal.SIGINT)
    yield steps
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(
    model: Any, stop_at: list[int], tmp_path: Path
) -> None:
    said: list[Any] = []
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    train_clt(whole, settings(), model=model, dataset=text(), log=said.append)
    assert str(said[0]).startswith("memory: ")
    files = [*(f"layer_{layer}.safetensors" for layer in range(N_LAYERS))]
    others = ["cross_layer.json", "cross_layer_record.json", "metrics.jsonl"]
    assert sorted(path.name for path in whole.iterdir()) == sorted([*files, *others])
    record = json.loads((whole / "cross_layer_record.json").read_text())
    assert record["config"]["layers"] == [0, 1, 2] and len(record["l0_in_training"]) == N_LAYERS
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(lines[0]["fvu"]) == len(lines[0]["coefficient"]) == N_LAYERS
    for step in (4, 9):
        stop_at[:] = [step]
        with pytest.raises(InterruptedException):
            train_clt(paused, settings(), model=model, dataset=text())
        assert [path.name for path in (paused / "checkpoints").iterdir()] == [str(step)]
        assert not list(paused.glob("layer_*"))
    with pytest.raises(ValueError, match=r"unfinished run with lr=0\.003, and lr is 0\.1 now"):
        train_clt(paused, settings(lr=0.1), model=model, dataset=text())
    stop_at.clear()
    train_clt(paused, settings(), model=model, dataset=text())
    assert not (paused / "checkpoints").exists()
    found, expected = weights(paused), weights(whole)
    assert len(found) == 5 * N_LAYERS
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    with pytest.raises(ValueError, match="already holds finished"):
        train_clt(whole, settings(), model=model, dataset=text())


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # With silent latents among what a checkpoint has to hold.
    chosen = settings(training_tokens=70 * 41, target_l0=3.0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_clt(whole, chosen, model=model, dataset=text())
    show = Trainer._show

    def dies(self: Trainer, *args: Any) -> None:
        if self.step == 60:
            raise SystemError("killed")
        show(self, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Trainer, "_show", dies)
        train_clt(killed, chosen, model=model, dataset=text())
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["52"]
    train_clt(killed, chosen, model=model, dataset=text())
    for name, value in weights(whole).items():
        assert torch.equal(weights(killed)[name], value), name


def test_what_is_saved_takes_and_gives_the_model_s_own_activations(
    model: Any, tmp_path: Path
) -> None:
    """Trained on scaled rows, judged on raw ones: folding both sides leaves the fit as it was."""
    chosen = settings(training_tokens=150 * 41, target_l0=11.0)
    train_clt(tmp_path, chosen, model=model, dataset=text())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    in_training = json.loads(lines[-1])["fvu"]
    found = evaluate_clt(model, load_clt(tmp_path), tiny_tokens(41, POSITIONS))
    for layer, fvu in zip(found.layers, in_training, strict=True):
        assert layer.fvu == pytest.approx(fvu, rel=0.35) and layer.fvu < 0.9
        assert layer.l0 == pytest.approx(11, rel=0.25)


def test_every_layer_is_watched_and_its_alarm_names_it(
    model: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wild = settings(training_tokens=103 * 41, lr=1.0, layers=(1, 2))
    with caplog.at_level("WARNING"):
        train_clt(tmp_path / "clt", wild, model=model, dataset=text())
    lines = [json.loads(line) for line in (tmp_path / "clt/metrics.jsonl").read_text().splitlines()]
    raised = {line["of"]: line for line in lines if line.get("alarm") == "loss spike"}
    assert sorted(raised) == ["layer_1", "layer_2"]
    said = [record.getMessage() for record in caplog.records]
    for name, line in raised.items():
        assert line["step"] == 99 and "lower lr" in line["suggestion"]
        assert said.count(f"{name}, step 99: {line['message']}; {line['suggestion']}") == 1


def test_a_penalty_that_silences_latents_shows_it_and_raises_an_alarm(
    model: Any, tmp_path: Path
) -> None:
    # Silent means for 288 steps at this width and batch; there are looks at steps 300 to 600.
    harsh = settings(training_tokens=607 * 41, target_l0=None, l0_coefficient=30.0)
    train_clt(tmp_path / "clt", harsh, model=model, dataset=text())
    lines = [json.loads(line) for line in (tmp_path / "clt/metrics.jsonl").read_text().splitlines()]
    names = {(line["of"], line["alarm"]) for line in lines if "alarm" in line}
    assert {("layer_0", "latents dying"), ("layer_2", "latents dying")} <= names
    assert [line["dead"] for line in lines if "dead" in line][-1] > 0.5


def test_layers_can_be_chosen(model: Any, tmp_path: Path) -> None:
    chosen = settings(layers=(1, 2), hook_name="blocks.{layer}.hook_resid_mid")
    train_clt(tmp_path / "out", chosen, model=model, dataset=text())
    saved = load_clt(tmp_path / "out")
    assert saved.cfg.pairs[0].hook_in == "blocks.1.hook_resid_mid"
    assert sum(parameter.numel() for parameter in saved.parameters()) == parameter_count(saved.cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 2)}, "layers are 0, 2.*consecutive"),
        ({"layers": (1, 0)}, "consecutive and ascending"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (2, 3)}, "no layer 3"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, r"must hold \{layer\}"),
        ({"hook_name_out": "blocks.{layer}.hook_mlp_uot"}, "no hook 'blocks.0.hook_mlp_uot'"),
        ({"hook_name": OUT, "hook_name_out": LN}, "computed before"),
        ({"hook_name": OUT}, "that is an SAE"),
        ({"memory_gb": 1e-4}, "more than memory_gb=0.0001"),
        ({"training_tokens": 40}, "less than a batch"),
        ({"target_l0": 60.0}, "at most d_sae, which is 59"),
        ({"outlier_norm_ratio": -1.0}, "outlier_norm_ratio is -1.*greater than 0"),
        ({"target_l0": 7.0, "l0_coefficient": 0.1}, "both target_l0=7 and l0_coefficient=0.1"),
        ({"jumprelu_sparsity_loss_mode": "quadratic"}, "must be one of step, tanh"),
        ({"d_sae": 0}, "d_sae is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    model: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_clt(tmp_path / "out", settings(**changes), model=model, dataset=text())
    assert not list(tmp_path.glob("out/*"))


def test_unequal_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="output hooks have unequal widths.*a: 3, b: 5"):
        run._one_width({"a": 3, "b": 5}, "output")


def test_activations_that_are_not_finite_are_named() -> None:
    inputs, targets = random_batch()
    training_step = CLTTrainingStep(random_clt(), CLTTrainingConfig(target_l0=5.0))
    set_bandwidths(training_step, [0.5] * LAYERS)
    targets[1][3, 2] = torch.inf
    with pytest.raises(ValueError, match="blocks.1.hook_mlp_out hold NaN or infinite"):
        training_step.loss(inputs, targets)


MEASURE = """
import resource, sys
from jumprelu_plugin.transcoders.clt.run import CLTSettings, train_clt
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import tokenized_dataset
model = load_model()
text = tokenized_dataset(model.tokenizer, 128, "train")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
settings = CLTSettings(
    layers=(0, 1, 2), d_sae=4096, training_tokens=5 * 1024, train_batch_size_tokens=1024,
    n_batches_in_buffer=256, n_batches_for_norm_estimate=2, n_checkpoints=0,
    evaluation_sequences=0, step_kernel=sys.argv[2],
)
train_clt(sys.argv[1], settings, model=model, dataset=text)
print("grew", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_the_stated_memory_is_kept(path: str, tmp_path: Path) -> None:
    """The peak of a process, beyond what it held with the model loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out"), path],
        capture_output=True,
        text=True,
        # glibc then gives back what is freed; otherwise it keeps some of what it had.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    assert done.returncode == 0, done.stderr
    grew = float(done.stdout.split("grew")[1])
    record = json.loads((tmp_path / "out" / "cross_layer_record.json").read_text())
    stated = record["memory_estimate"]["total"] - record["memory_estimate"]["model"]
    # 100 MB for what libraries load on first use.
    assert 0.3 * stated < grew < stated + 1e8, (grew, record["memory_estimate"])


# ---------------------------------------------------------------- evaluation


def test_evaluation_is_what_hooks_by_hand_give(model: Any) -> None:
    clt = random_clt(D_MODEL, D_MODEL)
    tokens = tiny_tokens(7, 13)
    found = evaluate_clt(model, clt, tokens, batch_size=3, special_token_ids=[BOS])
    kept: dict[int, Tensor] = {}

    def hooks(layer: int) -> list[Any]:
        def read(x: Tensor, hook: Any) -> None:
            kept[layer] = x

        def write(y: Tensor, hook: Any) -> Tensor:
            # Layers that have not been computed yet write nothing here.
            x = torch.stack([kept.get(i, torch.zeros_like(y)) for i in range(N_LAYERS)])
            return torch.cat([y[:, :1], clt(x)[layer][:, 1:]], 1)  # BOS, the first, stays

        return [(f"blocks.{layer}.ln2.hook_normalized", read),
                (f"blocks.{layer}.hook_mlp_out", write)]  # fmt: skip

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten()).item()

    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens)
        spliced = model.run_with_hooks(
            tokens, fwd_hooks=[h for layer in range(N_LAYERS) for h in hooks(layer)]
        )
        x = torch.stack([cache[p.hook_in][:, 1:].flatten(0, 1) for p in clt.cfg.pairs])
        y = torch.stack([cache[p.hook_out][:, 1:].flatten(0, 1) for p in clt.cfg.pairs])
        error, firing = (clt(x) - y).square().sum((1, 2)), (clt.encode(x) > 0).float()
    assert found.n_predictions == 7 * 11
    assert found.loss_clean == pytest.approx(loss(clean), rel=1e-5)
    assert found.loss_spliced == pytest.approx(loss(spliced), rel=1e-5)
    assert abs(found.delta_loss) > 1e-3
    for layer, fidelity in enumerate(found.layers):
        deviation = (y[layer] - y[layer].mean(0)).square().sum()
        assert fidelity.fvu == pytest.approx((error[layer] / deviation).item(), rel=1e-4)
        assert fidelity.l0 == pytest.approx(firing[layer].sum(1).mean().item(), rel=1e-5)
    assert not model.blocks[1].hook_mlp_out.fwd_hooks


def test_a_transcoder_of_another_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="width 13 at blocks.0.ln2.* and the model 33"):
        evaluate_clt(model, random_clt(), tiny_tokens(3, 7))


# ---------------------------------------------------------------- the folder


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = random_clt(model_name="some-model")
    loaded = load_clt(save_clt(model, tmp_path))
    assert loaded.cfg == model.cfg
    for (name, value), (_, expected) in zip(
        loaded.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


def spoil(folder: Path, **changes: Any) -> None:
    path = folder / "layer_1.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"W_dec": torch.zeros(D_SAE, 3, D_OUT)},
            r"W_dec is \(53, 3, 11\), expected \(53, 2, 11\)",
        ),
        ({"b_enc": None}, "b_enc is missing"),
        ({"W_skip": torch.zeros(2, 2)}, r"W_skip is \(2, 2\), expected none"),
        ({"threshold": torch.full((D_SAE,), -0.1)}, "thresholds are negative"),
        ({"b_enc": torch.full((D_SAE,), torch.nan)}, "b_enc holds NaN"),
    ],
)
def test_broken_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_clt(random_clt(), tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_clt(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cross-layer transcoder"):
        load_clt(tmp_path)
    save_clt(random_clt(), tmp_path)
    (tmp_path / "layer_2.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="layer_2.safetensors is not a safetensors file"):
        load_clt(tmp_path)
    (tmp_path / "layer_2.safetensors").unlink()
    with pytest.raises(ValueError, match="layer_2.safetensors is missing"):
        load_clt(tmp_path)
    config = json.loads((tmp_path / "cross_layer.json").read_text())
    (tmp_path / "cross_layer.json").write_text(json.dumps({**config, "layers": [0, 2, 3]}))
    with pytest.raises(ValueError, match="cannot be read: layers are 0, 2, 3"):
        load_clt(tmp_path)


# ---------------------------------------------------------------- the export


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
    with pytest.raises(ValueError, match="reads 13 and writes 11"):
        export(source, "circuit-tracer", tmp_path / "out", n_layers=LAYERS, unchecked=True)
    with pytest.raises(ValueError, match="cross-layer transcoder use --to circuit-tracer"):
        export(source, "saelens", tmp_path / "out")


# ---------------------------------------------------------------- the command


def test_the_command_hands_over_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def note(output: Path, chosen: CLTSettings, log: Any) -> Path:
        given.append((output, chosen))
        return output

    monkeypatch.setattr(run, "train_clt", note)
    flags = "--training_tokens 99 --target-l0 7 --d_sae 59 --layers 0-2 --memory-gb 3"
    flags += " --jumprelu_sparsity_loss_mode tanh"
    arguments = ["train-clt", "--model_name", "m", "--output_path", str(tmp_path), *flags.split()]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = CLTSettings(
        model_name="m",
        training_tokens=99,
        target_l0=7.0,
        d_sae=59,
        jumprelu_sparsity_loss_mode="tanh",
        layers=(0, 1, 2),
        memory_gb=3.0,
    )
    assert given == [(tmp_path, expected)]


def test_evaluate_takes_its_folder(tmp_path: Path) -> None:
    cfg = CLTConfig(256, 256, 59, tuple(range(6)), model_name=EMBEDDED_MODEL)
    save_clt(CrossLayerTranscoder(cfg), tmp_path / "clt")
    record = tmp_path / "record.json"
    arguments = ["evaluate", str(tmp_path / "clt"), "--sequences", "2", "--context_size", "29"]
    result = CliRunner().invoke(app, [*arguments, "--output_path", str(record)])
    assert result.exit_code == 0, result.output
    found = json.loads(record.read_text())["result"]
    assert len(found["layers"]) == 6 and f"{found['delta_loss']:.4f}" in result.output
