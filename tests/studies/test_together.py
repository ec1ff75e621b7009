"""SAEs trained together are the SAEs trained alone; which ones are, and what stops them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.studies.sweep import groups
from jumprelu_plugin.studies.sweep import run as run_module
from jumprelu_plugin.studies.sweep.grid import SweepSettings
from jumprelu_plugin.studies.sweep.record_file import read_records
from jumprelu_plugin.studies.sweep.run import RECORDS_FILENAME, run_sweep
from jumprelu_plugin.studies.sweep.together import train_together
from jumprelu_plugin.studies.sweep.training import batches, train, trainer_config

pytestmark = pytest.mark.usefixtures("one_kernel")
D_IN, D_SAE, BATCH, STEPS = 17, 101, 43, 100
HOOK = "blocks.1.hook_resid_post"
# Fields in which SAEs that train together differ, beside L0 and seed.
FIELDS: list[dict[str, Any]] = [
    {},
    {"max_latent_density": 0.1},
    {"matryoshka_widths": [7, 23], "outlier_norm_ratio": 1.5},
    {"resample_dead_latents": False, "unit_norm_decoder": False},
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def rows() -> torch.Tensor:
    """Sparse features beside a few tokens of large norm."""
    generator = torch.Generator().manual_seed(1)
    strength = (torch.rand(1_201, 60, generator=generator) - 0.9).relu()
    made = strength @ torch.randn(60, D_IN, generator=generator) + 0.3
    made[::97] *= 30
    return made


def sae(place: int) -> JumpReLUTrainingSAE:
    torch.manual_seed(place)
    fields = FIELDS[place % len(FIELDS)]
    cfg = DEFAULT.sae_config(D_IN, D_SAE, target_l0=3.0 + place, step_kernel="sparse", **fields)
    return JumpReLUTrainingSAE(cfg)


def config() -> Any:
    return trainer_config(STEPS, BATCH, 6e-3)


def test_they_are_the_saes_that_are_trained_alone(two_threads: None) -> None:
    """To the bit, where each step runs on one thread: four configs, two orders of the batches."""
    orders = [5, 8, 5, 8]
    torch.set_num_threads(1)
    alone = [sae(place) for place in range(4)]
    runs = [
        train(one, batches(rows(), BATCH, seed), config(), samples=7)
        for one, seed in zip(alone, orders, strict=True)
    ]
    torch.set_num_threads(2)
    streams = {seed: batches(rows(), BATCH, seed) for seed in set(orders)}
    together = [sae(place) for place in range(4)]
    steps: list[int] = []
    found = train_together(
        together, [streams[seed] for seed in orders], config(), on_step=steps.append, samples=7
    )
    assert sorted(steps) == sorted(list(range(4)) * STEPS)
    assert torch.get_num_threads() == 2
    for place, (mine, wanted) in enumerate(zip(together, alone, strict=True)):
        for name, value in wanted.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), (place, name)
        assert mine.control.state() == wanted.control.state()
        for name, value in wanted.control.tensors().items():
            assert torch.equal(mine.control.tensors()[name], value), (place, name)
        assert found[place].dynamics == runs[place].dynamics
        assert found[place].trained_together == 4
    # What was compared did happen.
    assert any(int(one.control.firing.lived.min()) < STEPS for one in alone if one.control.firing)
    density = alone[1].control.density
    assert density is not None and bool((density.multipliers > 0).any())


def test_batches_are_read_once(two_threads: None) -> None:
    read: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        for batch in batches(rows(), BATCH, seed=5):
            read.append(threading.get_ident())
            yield batch

    shared = source()
    train_together([sae(0), sae(1), sae(2)], [shared] * 3, config())
    assert len(read) == STEPS + config().n_batches_for_norm_estimate


def test_an_error_in_one_ends_all_and_is_raised(two_threads: None) -> None:
    saes = [sae(0), sae(1), sae(2)]

    def fail(place: int) -> None:
        if place == 1 and int(saes[1].control.l0.steps) == 20:  # type: ignore[union-attr]
            raise RuntimeError("no more")

    shared = batches(rows(), BATCH, seed=5)
    with pytest.raises(RuntimeError, match="no more"):
        train_together(saes, [shared] * 3, config(), on_step=fail)
    assert torch.get_num_threads() == 2
    # By name: beside a busy core, step/spinning.py may keep a thread of its own meanwhile.
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sae_")]
    assert all(one.control.l0.steps <= 30 for one in saes if one.control.l0)


def test_saes_that_would_begin_with_other_batches_are_refused() -> None:
    cfg = DEFAULT.sae_config(D_IN, D_SAE, target_l0=4.0, normalize_activations="none")
    with pytest.raises(ValueError, match="give them batches of their own"):
        train_together(
            [sae(0), JumpReLUTrainingSAE(cfg)], [batches(rows(), BATCH, 5)] * 2, config()
        )


# ---------------------------------------------------------------- in a sweep


def settings(**changes: Any) -> SweepSettings:
    given = {"architectures": ("jumprelu-plugin", "topk"), "l0": (5, 7), "seeds": (0, 1)}
    return SweepSettings(**{**given, "hook_names": (HOOK, "b"), "d_sae": 37, **changes})


def test_saes_of_this_package_at_one_hook_are_a_group(two_threads: None) -> None:
    def shape(**changes: Any) -> list[tuple[str, int]]:
        chosen = settings(**changes)
        found = groups.group_cells(chosen.cells(), chosen)
        assert sorted(c.name for group in found for c in group) == sorted(
            cell.name for cell in chosen.cells()
        )
        return [(group[0].architecture[0] + group[0].hook[0], len(group)) for group in found]

    others = [("tb", 1)] * 8
    assert sorted(shape()) == [("jb", 4), ("jb", 4), *others]
    assert sorted(shape(train_together=3)) == [*[("jb", 1)] * 2, *[("jb", 3)] * 2, *others]
    assert shape(architectures="jumprelu-plugin", train_together=1) == [("jb", 1)] * 8
    assert shape(architectures="jumprelu-plugin", device="cuda") == [("jb", 1)] * 8
    torch.set_num_threads(1)
    assert shape(architectures="jumprelu-plugin") == [("jb", 1)] * 8


def test_as_many_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(d_sae=8192, train_batch_size_tokens=2048)
    monkeypatch.setattr(groups, "taken", lambda _: 0)

    def with_room(count: float) -> int:
        monkeypatch.setattr(groups, "available", lambda _: count / groups.SHARE_OF_MEMORY)
        return groups.largest_group(chosen, 576, 40, threads=2)

    five = groups.bytes_together(chosen, 576, 40, 5, 2)
    # Weights and both of Adam's moments of each, and two steps' gradients.
    assert 5 * 3 * 4 * 2 * 576 * 8192 < five < 1.8e9
    assert [with_room(n) for n in (0, five - 1, five, 1e12)] == [1, 4, 5, 8]
    monkeypatch.setattr(groups, "available", lambda _: None)
    assert groups.largest_group(chosen, 576, 40, threads=2) == 8


@pytest.mark.slow  # seven SAEs, evaluated on two threads
def test_a_sweep_stopped_in_a_group_ends_with_the_table_of_saes_trained_alone(
    model_and_text: tuple[str, str],
    tmp_path: Path,
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = model_and_text
    chosen = {
        "architectures": ("jumprelu-plugin",),
        "l0": (5, 7, 9),
        "hook_names": (HOOK,),
        "training_tokens": 31 * 20,
        "train_batch_size_tokens": 31,
        "context_size": 13,
        "held_out": 17,
        "model_name": model,
        "dataset_path": text,
    }
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    run_sweep(tmp_path / "alone", settings(**chosen, seeds=(0,), train_together=1), console=quiet)

    class Killed(BaseException):
        pass

    def die_at_the_second(path: Path, record: Any) -> None:
        if path.exists():
            raise Killed
        real(path, record)

    real = run_module.append_record
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "append_record", die_at_the_second)
        with pytest.raises(Killed):
            run_sweep(tmp_path / "t", settings(**chosen, seeds=(0,)), console=quiet)
    run_sweep(tmp_path / "t", settings(**chosen, seeds=(0,)), console=quiet)
    tables = []
    for name in ("alone", "t"):
        records, _ = read_records(tmp_path / name / RECORDS_FILENAME)
        tables.append(sorted(records, key=lambda record: record["target_l0"]))
    assert [r["trained_together"] for r in tables[0]] == [1, 1, 1]
    # The first was measured, the second saved, and the third is alone when the sweep goes on.
    assert [r["trained_together"] for r in tables[1]] == [3, 3, 1]
    for alone, together in zip(*tables, strict=True):
        assert alone["lr_by_rule"] and alone["lr"] == together["lr"] == 8.8e-3
        for name in ("fvu", "l0", "delta_lm_loss", "uniformity"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3), name
