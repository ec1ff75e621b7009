"""What a run on many processes will take, said before any of them starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import many_gpus, tables
from jumprelu_plugin.training.distributed import planning
from jumprelu_plugin.training.distributed.forecast import TrainingSizes, step_times, traffic
from jumprelu_plugin.training.distributed.hardware import HARDWARE, hardware
from jumprelu_plugin.training.health import memory
from tests.training.distributed.test_runs import BATCH, small
from tests.training.runs import token_rows

GEMMA = TrainingSizes(d_in=2304, d_out=2304, d_sae=16_384, batch=4096, entries=210.0)
H100 = HARDWARE["h100"]


def plan(model: Any, folder: Path, data: int, latents: int, **fields: Any) -> planning.Plan:
    return planning.plan(
        small(folder, **fields),
        data_parallel_size=data,
        model_parallel_size=latents,
        override_model=model,
        override_dataset=token_rows(),
    )


def test_one_gpu_at_its_peaks() -> None:
    times = step_times(GEMMA, 1, 1, H100)
    # One [4096, 2304, 16384] product at 989 TFLOP/s; no model, nothing to exchange.
    assert times.compute == pytest.approx(0.3126e-3, rel=1e-3)
    assert times.exchange == 0
    # 75.5 million numbers: twelve passes over them and five over half, and 3 rows of 9,216 bytes
    # for each of 860,160 pairs, at 3.35 TB/s.
    numbers, rows = 75.5e6 * 4 * (12 + 2.5), 3 * 9216 * 860_160
    assert times.memory == pytest.approx((numbers + rows) / 3.35e12, rel=1e-3)
    assert times.bound == "memory" and times.least == times.memory


def test_more_replicas_share_tokens_and_more_shards_share_passes() -> None:
    one, tokens, latents = (step_times(GEMMA, *sizes, H100) for sizes in ((1, 1), (8, 1), (1, 8)))
    assert tokens.compute == pytest.approx(one.compute / 8)
    assert latents.memory == pytest.approx(one.memory / 8, rel=1e-3)
    assert tokens.memory > one.memory / 8 + 7 / 8 * 75.5e6 * 4 * 14 / 3.35e12  # Adam is not shared
    # All gradients over NVLink by ring, and a 4,096 x 2,304 batch: at least these.
    assert tokens.exchange > 2 * 7 / 8 * 4 * 75.5e6 / 450e9
    assert step_times(GEMMA, 16, 1, H100).exchange > 8 * tokens.exchange  # by network


def test_a_group_of_one_exchanges_nothing() -> None:
    assert traffic(GEMMA, 1, 1).total == 0
    assert traffic(GEMMA, 1, 4).tokens == 0 and traffic(GEMMA, 4, 1).latents == 0


def test_a_plan_is_of_one_process(model: Any, tmp_path: Path) -> None:
    found = plan(model, tmp_path, 2, 4)
    shown = [str(cell) for cell in found.table().columns[1].cells]
    assert "12 of 48 latents" in shown[0] and f"{BATCH // 2} of {BATCH} tokens" in shown[0]
    assert "a step" in shown[1] and H100.name in shown[2]
    whole = plan(model, tmp_path, 1, 1).preflight.memory
    own = found.preflight.memory
    assert whole is not None and own is not None
    assert own.optimizer == pytest.approx(whole.optimizer / 4, rel=0.05)  # b_dec is whole
    assert found.sizes.prefixes == 2 and found.sizes.model_parameters > 0
    assert not (tmp_path / "output").exists()


def test_what_cannot_fit_is_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = plan(model, tmp_path, 1, 1).preflight.memory
    assert one is not None
    monkeypatch.setattr(memory, "available", lambda device: int(1.5 * one.peak))
    assert not plan(model, tmp_path, 1, 1).preflight.of("refused")
    refused = plan(model, tmp_path, 2, 2).preflight
    with pytest.raises(ValueError, match="4 processes take .* together, and this machine has"):
        refused.refuse()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2), "data_parallel_size is 0; expected"),
        ((1, 5), "d_sae is 48, which model_parallel_size=5 does not divide"),
        ((4, 1), "train_batch_size_tokens is 62, which data_parallel_size=4 does not divide"),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_refused(
    sizes: tuple[int, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(None, tmp_path, *sizes)


def test_unknown_hardware_is_refused() -> None:
    with pytest.raises(ValueError, match="hardware is 'b7'; published figures are recorded for"):
        hardware("b7")


def test_the_page_is_what_the_arithmetic_says() -> None:
    text = many_gpus.PAGE.read_text()
    assert tables.fill(text, "mesh", many_gpus.BLOCKS) == text, "python -m benchmarks.many_gpus"
    assert all(f"<!-- mesh:{name} -->" in text for name in many_gpus.BLOCKS)
