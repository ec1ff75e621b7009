"""Refits to an L0, against closed forms, brute force and stock SAELens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from sae_lens import SAE
from tiny import BOS, HEADS, RESIDUAL, tiny_models, tiny_sae, tiny_tokens
from torch import Tensor
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.finetune.activations import harvest_activations
from jumprelu_plugin.finetune.l0_sweep import (
    SweepPoint,
    frontier_table,
    parse_l0_list,
    run_l0_sweep,
    sweep_warnings,
)
from jumprelu_plugin.finetune.refit import (
    RefitSettings,
    max_l0,
    mean_l0,
    refit,
    refit_to_each,
    shift_thresholds,
)
from jumprelu_plugin.saes.parameters import Parameters

pytestmark = pytest.mark.usefixtures("one_thread")
D_IN, D_SAE, TOKENS = 33, 41, 4099


def l0_of(sae: Any, x: Tensor) -> float:
    return float((sae.encode(x) > 0).sum()) / len(x)


def activations(seed: int, tokens: int = TOKENS, d_in: int = D_IN) -> Float[Tensor, "n d"]:
    generator = torch.Generator().manual_seed(seed)
    return 2.3 * torch.randn(tokens, d_in, generator=generator) + torch.linspace(-1, 1, d_in)


def untrained(d_sae: int = 67) -> Parameters:
    """Random directions that are read and written alike, with free norms; L0 about 10."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(d_sae, D_IN, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    norms = torch.linspace(0.4, 1.6, d_sae)
    return Parameters(
        W_enc=rows.T / norms,
        b_enc=torch.zeros(d_sae),
        W_dec=rows * norms[:, None],
        b_dec=torch.linspace(-1, 1, D_IN),
        threshold=2.3 / norms,
        subtracts_b_dec=True,
    )


def loaded(parameters: Parameters) -> Any:
    """The stock SAE with these parameters."""
    sae = tiny_sae(d_in=parameters.d_in, d_sae=parameters.d_sae)
    sae.cfg.apply_b_dec_to_input = parameters.subtracts_b_dec
    sae.load_state_dict(parameters.tensors())
    return sae


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("target", [3, 7.5, 17])
def test_one_shift_reaches_the_target_exactly(subtracts: bool, target: float) -> None:
    sae = tiny_sae()
    sae.cfg.apply_b_dec_to_input = subtracts
    before, x = Parameters.of(sae), activations(3)
    after = shift_thresholds(before, target, x)
    assert l0_of(loaded(after), x) == pytest.approx(target, abs=1.01 / TOKENS)
    shift = (after.threshold - before.threshold) * before.W_dec.norm(dim=1)
    moved = shift[after.threshold > 0]
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=1e-4, atol=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_the_maximum_l0_is_that_of_thresholds_at_zero() -> None:
    sae = tiny_sae()
    x, parameters = activations(3), Parameters.of(sae)
    positive = float((x @ sae.W_enc - sae.b_dec @ sae.W_enc + sae.b_enc > 0).sum()) / len(x)
    assert max_l0(parameters, x) == pytest.approx(positive, abs=2 / TOKENS)
    assert mean_l0(parameters, x) == pytest.approx(l0_of(sae, x), abs=2 / TOKENS)
    shift_thresholds(parameters, positive - 0.01, x)
    for refuse in (
        lambda: shift_thresholds(parameters, positive + 0.01, x),
        lambda: list(refit_to_each(parameters, [5, positive + 0.01], x, RefitSettings(steps=0))),
    ):
        with pytest.raises(ValueError, match=f"with every threshold at 0, {positive:.3g}"):
            refuse()


def test_trained_thresholds_are_those_of_the_closed_form() -> None:
    """Orthonormal decoder, W_enc = W_decᵀ, b_enc = c: with z_i kept, latent i leaves an error of
    c_i², without it (z_i - c_i)². An activation at θ_i therefore lowers the error by θ_i² - 2 θ_i
    c_i, which at the optimum is λ for all of them: θ_i = c_i + √(c_i² + λ).
    """
    d = 23
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    offset = torch.linspace(-0.9, 0.9, d)
    spread = torch.linspace(1, 2, d).roll(7)
    x = (torch.randn(60_013, d, generator=generator) * spread) @ rotation
    before = Parameters(
        W_enc=rotation.T.contiguous(),
        b_enc=offset,
        W_dec=rotation,
        b_dec=torch.zeros(d),
        threshold=1 + torch.rand(d, generator=generator),
    )
    target = 4.7
    settings = RefitSettings(steps=400, batch_tokens=3001, lr=3e-2)
    after = refit(before, target, x, settings)

    z = x @ before.W_enc + offset
    low, high = 0.0, 100.0
    for _ in range(50):  # λ by bisection on the L0 of the closed form
        multiplier = (low + high) / 2
        best = offset + (offset.square() + multiplier).sqrt()
        low, high = (
            (multiplier, high) if float((z > best).sum()) / len(z) > target else (low, multiplier)
        )
    assert l0_of(loaded(after), x[:32_768]) == pytest.approx(target, abs=1e-3)
    torch.testing.assert_close(after.threshold, best, rtol=0.06, atol=0.0)
    # One shift is far from it.
    gap = (shift_thresholds(before, target, x).threshold / best - 1).abs().max()
    assert gap > 0.25


@pytest.mark.parametrize("train", ["thresholds", "decoder", "all"])
def test_refits_up_and_down_reach_the_target_on_held_out_tokens(train: str) -> None:
    before, x, held_out = untrained(), activations(3, 20_011), activations(4, 20_021)
    targets = [4, 7, 13, 19, 25]
    assert 7 < mean_l0(before, x) < 13 and max_l0(before, x) > 25
    settings = RefitSettings(train=train, steps=60, batch_tokens=1009)
    found = dict(refit_to_each(before, targets, x, settings))
    assert sorted(found) == targets
    for target, parameters in found.items():
        point = loaded(parameters)
        assert l0_of(point, held_out) == pytest.approx(target, rel=0.03)
        error = float((point(held_out) - held_out).square().sum())
        shift = loaded(shift_thresholds(before, target, x))
        at_once = float((shift(held_out) - held_out).square().sum())
        # All latents are alike here: thresholds alone have nothing to gain, and the others have.
        assert error < (1.005 if train == "thresholds" else 0.9) * at_once
        if train != "all":
            assert torch.equal(parameters.W_enc, before.W_enc)
        if train == "thresholds":
            assert parameters.subtracts_b_dec
            for name in ("b_enc", "W_dec", "b_dec"):
                assert torch.equal(getattr(parameters, name), getattr(before, name))
        if train == "decoder":  # b_dec is folded out, so that the encoder stays what it was
            z, same = parameters.pre_activations(held_out), before.pre_activations(held_out)
            torch.testing.assert_close(z, same, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_error_of_unlike_latents() -> None:
    before, x, held_out = untrained(), activations(3, 20_011), activations(4)
    offset = torch.linspace(-1.5, 1.5, before.d_sae) / before.W_dec.norm(dim=1)
    before = dataclasses.replace(before, b_enc=offset)
    error = {}
    for steps in (0, 150):
        point = loaded(refit(before, 9, x, RefitSettings(steps=steps, batch_tokens=1009)))
        error[steps] = float((point(held_out) - held_out).square().sum())
    assert error[150] < 0.9 * error[0]


def test_bad_requests_are_refused() -> None:
    parameters, x = Parameters.of(tiny_sae()), activations(3)
    for targets, said in (([], "no target L0s"), ([5, 5], "twice"), ([-1], "more than 0")):
        with pytest.raises(ValueError, match=said):
            list(refit_to_each(parameters, targets, x, RefitSettings()))
    with pytest.raises(ValueError, match="one batch takes 9000"):
        refit(parameters, 5, x, RefitSettings(batch_tokens=9000))
    with pytest.raises(ValueError, match="must be one of thresholds, decoder, all"):
        RefitSettings(train="encoder")
    with pytest.raises(ValueError, match="steps"):
        RefitSettings(steps=-1)
    with pytest.raises(ValueError, match="10,x"):
        parse_l0_list("10,x")
    assert parse_l0_list("10, 20.5") == (10, 20.5)


# ---------------------------------------------------------------- folders and records


def test_a_sweep_is_stock_folders_and_a_record(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae")
    models = tiny_models(tmp_path / "tokenizer")
    tokens = tiny_tokens(301, 17, seed=3)
    rows = harvest_activations(models.hooked, RESIDUAL, tokens, special_token_ids=[BOS])
    held_out = harvest_activations(models.hooked, RESIDUAL, tiny_tokens(53, 17, seed=4))
    said: list[str] = []
    points = run_l0_sweep(
        tmp_path / "sae",
        [12, 5],
        tmp_path / "out",
        activations=rows,
        held_out=held_out,
        settings=RefitSettings(steps=5, batch_tokens=503),
        model=models.hooked,
        tokens=tiny_tokens(7, 17, seed=5),
        log=said.append,
    )
    assert [point.target_l0 for point in points] == [5, 12] and len(said) == 2
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["l0_12", "l0_5", "l0_sweep.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "l0_sweep.jsonl").open()]
    assert {line["target_l0"]: line["l0"] for line in lines} == {r.target_l0: r.l0 for r in points}
    assert all(line["kind"] == "l0_sweep" and line["settings"]["steps"] == 5 for line in lines)
    for point in points:
        sae = SAE.load_from_disk(tmp_path / "out" / point.folder)
        assert sae.cfg.architecture() == "jumprelu" and sae.cfg.metadata.hook_name == RESIDUAL
        assert point.l0 == pytest.approx(l0_of(sae, held_out), rel=1e-6)
        error = (sae(held_out) - held_out).square().sum()
        variance = (held_out - held_out.mean(0)).square().sum()
        assert point.fvu == pytest.approx(float(error / variance), rel=1e-4)
        assert point.delta_loss is not None
    assert "delta LM loss" in [str(column.header) for column in frontier_table(points).columns]
    with pytest.raises(ValueError, match="not empty"):
        run_l0_sweep(tmp_path / "sae", [5], tmp_path / "out", activations=rows, held_out=held_out)


def test_an_interrupted_sweep_keeps_complete_points(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae")

    def stop(text: str) -> None:
        if "L0 5" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_l0_sweep(
            tmp_path / "sae",
            [5, 8],
            tmp_path / "out",
            activations=activations(3),
            held_out=activations(4),
            settings=RefitSettings(steps=0),
            log=stop,
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["l0_8", "l0_sweep.jsonl"]
    assert SAE.load_from_disk(tmp_path / "out" / "l0_8").cfg.d_sae == 41


def test_activations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny_sae().save_model(tmp_path / "sae")
    broken = activations(3)
    broken[7, 2] = torch.nan
    for name, x, said in (
        ("activations", activations(3, d_in=29), r"activations has shape \(4099, 29\)"),
        ("held_out", broken, "held_out holds NaN"),
    ):
        given = {"activations": activations(3), "held_out": activations(4)} | {name: x}
        with pytest.raises(ValueError, match=said):
            run_l0_sweep(tmp_path / "sae", [5], tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hook", [RESIDUAL, HEADS])
def test_harvested_activations_are_the_cache_without_special_tokens(
    hook: str, tmp_path: Path
) -> None:
    models, tokens = tiny_models(tmp_path), tiny_tokens(11, 13)
    rows = harvest_activations(models.hooked, hook, tokens, special_token_ids=[BOS], batch_size=3)
    _, cache = models.hooked.run_with_cache(tokens)
    wanted = cache[hook].flatten(2)[:, 1:].flatten(0, 1)
    assert rows.shape == wanted.shape
    assert float((rows[:7] - wanted[:7]).abs().max()) > 0.1  # in another order
    torch.testing.assert_close(rows.sort(0).values, wanted.sort(0).values, rtol=1e-4, atol=1e-5)
    distances = torch.cdist(rows.double(), wanted.double())
    assert float(distances.min(1).values.max()) < 1e-4
    with pytest.raises(ValueError, match="no hook"):
        harvest_activations(models.hooked, "blocks.9.hook_resid_post", tokens)


def test_warnings_name_the_points_that_are_off() -> None:
    good = SweepPoint("l0_10", 10, 10.1, 0.2, 0.3, 0.0, 0.0, None)
    off = dataclasses.replace(good, target_l0=20, l0=21, fvu=0.25)
    assert sweep_warnings([good]) == []
    first, second = sweep_warnings([good, off])
    assert "5.0% off" in first and "no lower error than L0 10" in second
    (worse,) = sweep_warnings([dataclasses.replace(good, shifted_fvu=0.19)])
    assert "train for more steps" in worse


def test_the_command_on_the_embedded_model(tmp_path: Path) -> None:
    sae = tiny_sae("blocks.1.hook_resid_post", d_in=256, d_sae=67)
    sae.cfg.metadata.model_name = "tiny-gemma-2"
    sae.save_model(tmp_path / "sae")
    few = [
        "--sequences",
        "9",
        "--held_out",
        "5",
        "--steps",
        "2",
        "--train_batch_size_tokens",
        "211",
    ]
    arguments = ["l0-sweep", str(tmp_path / "sae"), "--output_path", str(tmp_path / "out"), *few]
    result = CliRunner().invoke(app, [*arguments, "--l0", "5,9"])
    assert result.exit_code == 0, result.output
    assert "L0 sweep" in result.output
    assert SAE.load_from_disk(tmp_path / "out" / "l0_9").cfg.d_sae == 67
    result = CliRunner().invoke(app, [*arguments, "--l0", "many"])
    assert result.exit_code == 2 and "give numbers such as" in result.output
