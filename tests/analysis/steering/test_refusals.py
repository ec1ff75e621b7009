"""Interventions that make no sense are refused by name."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from jumprelu_plugin.analysis.steering import Ablate, Add, Clamp, steer, steering_vector
from tests.analysis.steering.edits import steered, trace
from tests.tiny import tiny_sae


@pytest.mark.parametrize("given", [[False, True], torch.tensor([True, False, True])])
def test_a_mask_is_not_taken_for_numbers(given):
    for fields in ({"positions": given}, {"batch": given}):
        with pytest.raises(ValueError, match="must be whole numbers; .*mask.nonzero"):
            Add(3, 1.0, **fields)


def test_numbers_are_whole():
    for name, given in (("latent", 3.7), ("positions", [1.7, 2.2]), ("positions", slice(1.5, 4)),
                        ("batch", [0.9]), ("latent", "3")):  # fmt: skip
        fields = {"latent": 3, name: given}
        with pytest.raises(ValueError, match=f"{name} must be whole numbers"):
            Ablate(**fields)
    found = Ablate(np.int64(3), positions=torch.tensor([4, 2]), batch=np.array([0, 5]))
    assert found == Ablate(3, positions=(4, 2), batch=(0, 5))
    assert Ablate(torch.tensor(3), positions=np.int64(4)) == Ablate(3, positions=[4])


def test_bad_input_is_named(models, tokens):
    sae = tiny_sae()

    def enter(model, sae, plan):
        with steer(model, sae, plan):
            model(tokens)

    before = trace(models.hooked)
    with pytest.raises(ValueError, match=r"Clamp\(latent=41.*d_sae 41.*0 to 40"):
        enter(models.hooked, sae, Clamp(41, 1.0))
    with pytest.raises(ValueError, match="d_sae 41"):
        enter(models.hooked, sae, [Add(2, 1.0), Ablate(-1)])
    with pytest.raises(ValueError, match="No interventions"):
        enter(models.hooked, sae, [])
    with pytest.raises(TypeError, match="Add, Clamp or Ablate; got 3"):
        enter(models.hooked, sae, [3])
    with pytest.raises(ValueError, match="No interventions"):
        steering_vector(sae, {})
    with pytest.raises(ValueError, match="d_sae 41"):
        steering_vector(sae, {41: 1.0})
    unnamed = tiny_sae()
    unnamed.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="no hook name"):
        enter(models.hooked, unnamed, Add(2, 1.0))
    for model in (models.hooked, models.bridge):
        lost = tiny_sae()
        lost.cfg.metadata.hook_name = "blocks.1.hook_resid_pots"
        with pytest.raises(ValueError, match="Close names: .*blocks.1.hook_resid_post"):
            enter(model, lost, Add(2, 1.0))
        for plan in (Add(2, 1.0), Clamp(2, 1.0)):
            with pytest.raises(ValueError, match="'blocks.1.hook_resid_post' has width 33, .* 7"):
                enter(model, tiny_sae(d_in=7), plan)
    with pytest.raises(TypeError, match="no hook points"):
        enter(models.hf, sae, Add(2, 1.0))
    with models.hooked.saes([sae]), pytest.raises(ValueError, match="reset_saes"):
        enter(models.hooked, sae, Add(2, 1.0))
    outside = tiny_sae()
    outside.cfg.metadata.hook_name = "hook_embed"
    with pytest.raises(ValueError, match="inside the model's blocks"):
        enter(models.hooked, outside, Add(2, 1.0, positions=[1]))
    for normalization, message in (("expected_average_only_in", "Fold the scale"),
                                   ("layer_norm", "no fixed steering vector")):  # fmt: skip
        scaled = tiny_sae()
        scaled.cfg.normalize_activations = normalization
        with pytest.raises(ValueError, match=message):
            enter(models.hooked, scaled, Add(2, 1.0))
    models.hooked.setup()  # the splice above put a new hook point in place
    assert trace(models.hooked) == before


@pytest.mark.parametrize("positions", [[-1], slice(-3, None), "first", [], slice(5, 1, -1), -2])
def test_positions_count_from_the_start(positions):
    with pytest.raises(ValueError, match="positions must be"):
        Add(1, 1.0, positions=positions)


def test_interventions_check_their_own_numbers():
    with pytest.raises(ValueError, match="amount must be a finite number; got nan"):
        Add(1, float("nan"))
    with pytest.raises(ValueError, match="value must be a finite number; got inf"):
        Clamp(1, float("inf"))
    for rows in (-1, [], [2, -3]):
        with pytest.raises(ValueError, match="batch must name rows"):
            Ablate(1, batch=rows)
    assert Add(1, 2.0, positions=[3, 4]) == Add(1, 2.0, positions=(3, 4))
    with pytest.raises(AttributeError):
        Add(1, 2.0).amount = 3.0  # pyright: ignore[reportAttributeAccessIssue]


def test_an_intervention_that_touched_nothing_is_said(models, tokens):
    with pytest.warns(UserWarning, match=r"applied to no position .*latent=8"):
        steered(models.hooked, tiny_sae(), [Add(7, 1.0), Add(8, 1.0, positions=40)], tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(models.hooked, tiny_sae(), Add(8, 1.0, positions=40)):
            pass
