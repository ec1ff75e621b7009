"""`jumprelu train-many`: which dictionaries a command line or a YAML file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.cli.saelens_flags import Command
from jumprelu_plugin.cli.varied_flags import combinations, read_dictionaries
from jumprelu_plugin.control.learning_rate import learning_rate
from tests.tiny import HEADS, RESIDUAL


def read(given: str, file: Path | None = None, widths: Any = None) -> dict[str, Any]:
    command = Command("jumprelu train-many")
    return read_dictionaries(given.split(), file, "default", command, widths or {})


def test_every_combination_is_a_dictionary_named_by_what_tells_it_apart() -> None:
    given = "--target_l0 20,40 --lr=1e-3 --hook-name a.b,c --seed 3"
    found = combinations(given.split(), None)
    assert list(found) == [
        "a.b-target_l0_20", "c-target_l0_20", "a.b-target_l0_40", "c-target_l0_40",
    ]  # fmt: skip
    assert found["c-target_l0_40"] == {
        "target_l0": ["40"], "lr": ["1e-3"], "hook_name": ["c"], "seed": ["3"],
    }  # fmt: skip


def test_recipes_follow_the_width_of_each_hook() -> None:
    widths = {RESIDUAL: 2304, HEADS: 1031}
    size = "--d_sae 59 --training_tokens 99000 --train_batch_size_tokens 33"
    found = read(f"--hook_name {RESIDUAL},{HEADS} --target_l0 20 {size}", None, widths)
    assert {name: (cfg.sae.d_in, cfg.lr) for name, cfg in found.items()} == {
        hook: (width, learning_rate(width, 59, 20, 33, 3_000)) for hook, width in widths.items()
    }
    assert all(cfg.sae.max_latent_density == 0.06 for cfg in found.values())
    assert [cfg.sae.d_in for cfg in read("--d_in 31 --target_l0 7", None, widths).values()] == [31]


def test_a_file_holds_a_grid_or_a_list_of_them_and_flags_count_before_it(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("target_l0: [5, 7]\nd_sae: 41\ntraining_tokens: 999\n")
    found = read("--d_sae 43", grid)
    assert {name: (cfg.sae.d_sae, cfg.sae.target_l0) for name, cfg in found.items()} == {
        "target_l0_5": (43, 5), "target_l0_7": (43, 7),
    }  # fmt: skip
    assert all(cfg.training_tokens == 999 for cfg in found.values())
    grid.write_text(
        "- {name: nested, d-sae: 64, target_l0: 5, matryoshka_widths: [8, 16]}\n"
        "- {name: plain, seed: [1, 2], target_l0: 5, exclude_special_tokens: [2, 3]}\n"
    )
    found = read("--lr 0.002 --exclude_special_tokens 2 3", grid)
    assert list(found) == ["nested", "plain-seed_1", "plain-seed_2"]
    assert found["nested"].sae.matryoshka_widths == [8, 16]
    assert [cfg.seed for cfg in found.values()] == [42, 1, 2]
    assert all(cfg.exclude_special_tokens == [2, 3] for cfg in found.values())


def test_an_empty_value_in_a_file_is_none_also_over_a_recipes(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "- {name: held, l0_coefficient: null, target_l0: 5}\n"
        "- {name: , l0_coefficient: [null, 0.3], lr_end: null}\n"
    )
    command = Command("jumprelu train-many")
    found = read_dictionaries([], grid, "gemma_scope", command, {})
    assert {name: cfg.sae.l0_coefficient for name, cfg in found.items()} == {
        "held": None, "l0_coefficient_None": None, "l0_coefficient_0.3": 0.3,
    }  # fmt: skip
    assert found["held"].sae.target_l0 == 5
    assert found["held"].sae.l0_warm_up_steps == 0


@pytest.mark.parametrize(
    ("given", "text", "message"),
    [
        ("", "d_sae: null", "invalid int value: 'None'"),
        ("--target_l0 5,5", None, "two dictionaries are called 'sae'"),
        ("5 --target_l0 5", None, "'5' follows no flag"),
        ("--no_such 5", None, "unrecognized arguments: --no_such 5"),
        ("--d_sae 41,wide", None, "invalid int value: 'wide'"),
        ("", "target_l0: [5", "is no YAML"),
        ("", "[3]", "holds no dictionaries"),
        ("", "no_such: 4", "unrecognized arguments: --no_such 4"),
    ],
)
def test_what_describes_no_dictionaries_is_refused(
    given: str, text: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(given, None if text is None else file)
