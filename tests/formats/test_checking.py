"""The comparison after writing can fail, and then leaves nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from jumprelu_plugin.formats import export, load_dictionary
from jumprelu_plugin.formats.checking import (
    Check,
    compare_dictionary,
    random_inputs,
)
from jumprelu_plugin.saes.parameters import Parameters
from tests.dictionaries import random_sae, saved
from tests.formats.outputs import INPUTS, same_outputs


@pytest.mark.parametrize(
    "wrong",
    [
        {"subtracts_b_dec": False},  # b_dec not folded
        {"threshold": lambda t: t * 1.02},
        {"W_dec": lambda t: t + 1e-4 * torch.randn(t.shape)},
        {"b_dec": lambda t: t * 1.001},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_comparison_catches_a_wrong_file(wrong: dict) -> None:
    right = Parameters.of(random_sae())
    tensors = right.tensors()
    for name, change in wrong.items():
        if callable(change):
            tensors[name] = change(tensors[name])
    got = Parameters.named(tensors, wrong.get("subtracts_b_dec", True))
    compare_dictionary(right, right.encode, lambda x: right.decode(right.encode(x), x), "itself")
    with pytest.raises(ValueError, match="differ by"):
        compare_dictionary(right, got.encode, lambda x: got.decode(got.encode(x), x), "a test")


def test_activations_at_their_thresholds_count_however_many_latents_there_are() -> None:
    """A tool that rounds otherwise passes, and one that is wrong beside them does not."""
    tensors, many = Parameters.of(random_sae()).tensors(), 401
    jitter = torch.rand(
        tensors["W_enc"].shape[1] * many, generator=torch.Generator().manual_seed(5)
    )
    tensors |= {
        "W_enc": tensors["W_enc"].repeat(1, many) * (1 + 0.5 * jitter),
        "b_enc": tensors["b_enc"].repeat(many),
        "W_dec": tensors["W_dec"].repeat(many, 1) / many,
        "threshold": tensors["threshold"].repeat(many),
        # Long, as on a residual stream, so that rounding is coarse.
        "b_dec": 3e3 * torch.nn.functional.normalize(tensors["b_dec"], dim=0),
    }
    wide = Parameters.named(tensors, True)

    def with_thresholds(threshold: Tensor) -> tuple[Parameters, Check]:
        got = Parameters.named({**tensors, "threshold": threshold}, True)
        forward = lambda x: got.decode(got.encode(x), x)  # noqa: E731
        return got, compare_dictionary(wide, got.encode, forward, "a test", tolerance=1e-3)

    x, moved = random_inputs(wide), 3e-7 * 3e3 * tensors["W_enc"].norm(dim=0)
    rounded, check = with_thresholds(tensors["threshold"] + moved)
    assert check.inputs == len(x)
    assert ((rounded.encode(x) > 0) != (wide.encode(x) > 0)).any(-1).float().mean() > 0.9
    with pytest.raises(ValueError, match="differ by"):
        with_thresholds(tensors["threshold"] + 10 * moved)


def test_a_dictionary_of_which_rounding_decides_everything_is_refused() -> None:
    tensors = Parameters.of(random_sae()).tensors()
    tensors["b_dec"] = tensors["b_dec"] + 1e9
    coarse = Parameters.named(tensors, True)
    with pytest.raises(ValueError, match=r"100\.0% of the pre-activations .* Check the scales"):
        compare_dictionary(
            coarse, coarse.encode, lambda x: coarse.decode(coarse.encode(x), x), "a test"
        )


def test_nothing_is_left_when_the_comparison_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Parameters, "fold_b_dec", lambda self: self)
    with pytest.raises(ValueError, match="nothing was written"):
        export(saved(random_sae(), tmp_path / "sae"), "gemma-scope", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    export(folder, "gemma-scope", tmp_path / "out")
    export(folder, "saelens", tmp_path / "out")
    assert not (tmp_path / "out" / "params.npz").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier export"):
        export(folder, "saelens", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        export(folder, "saelens", tmp_path / "file")


def test_missing_tool_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "dictionary_learning", None)  # as if it were not installed
    folder = saved(random_sae(), tmp_path / "sae")
    with pytest.raises(ImportError, match=r"--no-deps dictionary-learning.*\n.*--unche"):
        export(folder, "dictionary-learning", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(folder, "dictionary-learning", tmp_path / "out", unchecked=True) is None
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] is None
    same_outputs(
        load_dictionary(tmp_path / "out").as_sae()(INPUTS), SAE.load_from_disk(folder)(INPUTS)
    )
