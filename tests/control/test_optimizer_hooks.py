"""Hooks before and after the optimizer's step, and the fused update."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from tests.control.small_training import good_config


def two_models() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(7, 5), nn.Linear(7, 5)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(11, 7, dtype=next(model.parameters()).dtype)).pow(2).sum().backward()
    optimizer.step()


def test_hooks_find_the_right_optimizer_and_bracket_its_steps() -> None:
    ours, other = two_models()
    events: list[str] = []
    seam = OptimizerHooks(
        ours.weight, before=lambda: events.append("before"), after=lambda: events.append("after")
    )
    for_ours = torch.optim.Adam(ours.parameters())
    for_other = torch.optim.Adam(other.parameters())
    take_step(other, for_other)
    assert events == [] and seam.optimizer is None
    take_step(ours, for_ours)
    assert seam.optimizer is for_ours
    assert events == ["before", "after"]
    take_step(other, for_other)
    take_step(ours, for_ours)
    assert events == ["before", "after"] * 2
    assert for_ours.param_groups[0]["fused"] is True
    assert not for_other.param_groups[0]["fused"]


def test_hooks_follow_to_the_optimizer_that_steps_now() -> None:
    """An SAE that is trained again has another one."""
    model = two_models()[0]
    events: list[str] = []
    seam = OptimizerHooks(
        model.weight, before=lambda: events.append("before"), after=lambda: events.append("after")
    )
    first, second = torch.optim.Adam(model.parameters()), torch.optim.Adam(model.parameters())
    for optimizer in (first, second, second, first):
        take_step(model, optimizer)
        assert seam.optimizer is optimizer
    assert events == ["before", "after"] * 4
    assert second.param_groups[0]["fused"] is True


def test_hooks_see_the_parameters_before_and_after_the_update() -> None:
    model = two_models()[0]
    seen: list[Tensor] = []
    note = lambda: seen.append(model.weight.detach().clone())  # noqa: E731
    seam = OptimizerHooks(model.weight, before=note, after=note)
    start = model.weight.detach().clone()
    take_step(model, torch.optim.Adam(model.parameters()))
    assert torch.equal(seen[0], start) and not torch.equal(seen[1], start)
    assert torch.equal(seen[1], model.weight)
    assert seam.optimizer is not None


def test_hooks_of_two_models_wait_for_two_optimizers() -> None:
    """Two SAEs in one process may both be waiting when the first optimiser steps."""
    models = two_models()
    events: list[str] = []
    seams = [
        OptimizerHooks(
            model.weight,
            before=lambda n=name: events.append(f"before {n}"),
            after=lambda n=name: events.append(f"after {n}"),
        )
        for name, model in zip("ab", models, strict=True)
    ]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        take_step(model, optimizer)
    assert events == ["before a", "after a", "before b", "after b"]
    assert [seam.optimizer for seam in seams] == optimizers


def test_hooks_let_go_of_parameters_that_are_gone() -> None:
    ours, other = two_models()
    events: list[str] = []
    seam = OptimizerHooks(ours.weight, before=lambda: events.append("!"), after=lambda: None)
    del ours
    gc.collect()
    take_step(other, torch.optim.Adam(other.parameters()))
    take_step(other, torch.optim.Adam(other.parameters()))
    assert events == [] and seam.optimizer is None


def test_an_sae_may_be_freed_or_made_while_another_optimizer_steps() -> None:
    """PyTorch walks through its listeners then, and refuses one that comes or goes."""
    ours, other = two_models()
    kept = [OptimizerHooks(ours.weight, before=lambda: None, after=lambda: None)]
    waiting: list[nn.Linear] = [ours]
    del ours

    def change(*_: object) -> None:
        waiting.clear()
        gc.collect()
        waiting.append(nn.Linear(7, 5))
        kept.append(OptimizerHooks(waiting[0].weight, before=lambda: None, after=lambda: None))

    # With one listener after it, or PyTorch's walk would be over.
    with (
        register_optimizer_step_pre_hook(change),
        register_optimizer_step_pre_hook(lambda *_: None),
    ):
        take_step(other, torch.optim.Adam(other.parameters()))
    assert len(kept) == 2 and kept[0].optimizer is None
    optimizer = torch.optim.Adam(waiting[0].parameters())
    take_step(waiting[0], optimizer)
    assert kept[1].optimizer is optimizer


def test_an_sae_that_is_never_stepped_can_be_freed() -> None:
    sae = JumpReLUTrainingSAE(good_config(l0_coefficient=0.1, target_l0=None)).train()
    sae.training_forward_pass(
        step_input=TrainStepInput(
            sae_in=torch.randn(17, 7),
            coefficients={"l0": 0.1},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    gone = weakref.ref(sae)
    del sae
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("choice", [{"foreach": True}, {"foreach": False}, {"fused": False}])
def test_hooks_respect_a_kernel_the_user_chose(choice: dict[str, bool]) -> None:
    model = two_models()[0]
    seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
    optimizer = torch.optim.Adam(model.parameters(), **choice)
    take_step(model, optimizer)
    assert seam.optimizer is optimizer
    assert not optimizer.param_groups[0]["fused"]


def test_hooks_leave_other_optimizers_alone() -> None:
    model = two_models()[0]
    seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take_step(model, optimizer)
    assert seam.optimizer is optimizer
    assert not optimizer.param_groups[0].get("fused")


@pytest.mark.parametrize("already", [0, 3])
def test_fused_update_is_the_plain_update(already: int) -> None:
    """Also when the switch comes late, as after resuming a run that began without it."""
    results = {}
    for kind in ("plain", "fused", "truth"):
        torch.manual_seed(3)
        model = two_models()[0]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if kind == "truth":
            model = model.double()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        batches = [torch.randn(11, 7) for _ in range(9)]
        for index, batch in enumerate(batches):
            if kind == "fused" and index == already:
                seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
            optimizer.zero_grad()
            model(batch.to(model.weight.dtype)).pow(2).sum().backward()
            optimizer.step()
        results[kind] = model.weight.detach().double()
        assert bool(optimizer.param_groups[0]["fused"]) == (kind == "fused")
        assert kind != "fused" or seam.optimizer is optimizer
    error = (results["fused"] - results["truth"]).abs().max()
    plain = (results["plain"] - results["truth"]).abs().max()
    floor = torch.finfo(torch.float32).eps * results["truth"].abs().max()
    assert error <= 2 * plain + floor


def by_column(model: nn.Linear) -> nn.Linear:
    model.weight.data = model.weight.data.t().contiguous().t()
    return model


def test_a_matrix_stored_by_column_gets_the_same_update_and_keeps_its_shape() -> None:
    found = []
    for layout in (lambda model: model, by_column):
        torch.manual_seed(3)
        model = layout(two_models()[0])
        strides = model.weight.stride()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
        for _ in range(4):
            take_step(model, optimizer)
        assert seam.optimizer is optimizer and model.weight.stride() == strides
        moments = [optimizer.state[model.weight][name] for name in ("exp_avg", "exp_avg_sq")]
        assert all(moment.shape == model.weight.shape for moment in moments)
        assert model.weight.grad is not None and model.weight.grad.shape == model.weight.shape
        # A checkpoint goes into any optimiser, and out of it.
        other = torch.optim.Adam(model.parameters(), lr=1e-2)
        other.load_state_dict(optimizer.state_dict())
        take_step(model, other)
        found.append([model.weight.detach().clone(), model.bias.detach(), *moments])
    for of_rows, of_columns in zip(*found, strict=True):
        torch.testing.assert_close(of_columns, of_rows, rtol=1e-6, atol=1e-7)


def test_an_interrupted_step_leaves_parameters_that_can_be_saved() -> None:
    model = by_column(two_models()[0])
    seam = OptimizerHooks(model.weight, before=lambda: None, after=lambda: None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    take_step(model, optimizer)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        take_step(model, optimizer)
    handle.remove()
    seam.restore_layout()
    assert model.weight.shape == (5, 7)
    assert optimizer.state[model.weight]["exp_avg"].shape == (5, 7)
    take_step(model, optimizer)
