"""What a run on many processes will take, said before any of them starts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LoggingConfig

from benchmarks import many_gpus, tables
from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.training.activations.pairs import PairStore
from jumprelu_plugin.training.distributed import planning
from jumprelu_plugin.training.distributed.division import Division, dictionary_parameters
from jumprelu_plugin.training.distributed.forecast import TrainingSizes, step_times, traffic
from jumprelu_plugin.training.distributed.hardware import HARDWARE, hardware
from jumprelu_plugin.training.distributed.launch import joined
from jumprelu_plugin.training.distributed.runner import ShardedTrainingRunner
from jumprelu_plugin.training.distributed.trainer import ShardTrainer
from jumprelu_plugin.training.health import memory, saving
from jumprelu_plugin.training.health.findings import memory_findings
from tests.training.distributed.processes import run_on
from tests.training.distributed.test_runs import BATCH, small
from tests.training.runs import CONTEXT, token_rows
from tests.training.transcoder_runs import LN, transcoder_config

GEMMA = TrainingSizes(d_in=2304, d_out=2304, d_sae=16_384, batch=4096, entries=210.0)
SKIP = dataclasses.replace(GEMMA, transcodes=True, skips=True)
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


def test_sequences_that_repeat_and_passes_that_are_not_shared_cost_the_model() -> None:
    def compute(processes: int, **fields: Any) -> float:
        sizes = dataclasses.replace(GEMMA, d_sae=8, model_parameters=1e9, **fields)
        return step_times(sizes, processes, 1, H100).compute

    alone = compute(1)
    assert compute(8) == pytest.approx(alone / 8, rel=1e-3)
    assert compute(8, prompts=32) == compute(8)
    assert compute(8, prompts=2) == pytest.approx(alone / 2, rel=1e-3)
    assert compute(8, prompts=12) == pytest.approx(alone * 2 / 12, rel=1e-3)
    assert compute(8, prompts=32, prefetches=True) == pytest.approx(alone, rel=1e-3)


def test_a_skip_costs_two_products_in_float32() -> None:
    plain, skip = (step_times(sizes, 2, 4, H100) for sizes in (GEMMA, SKIP))
    assert skip.compute - plain.compute == pytest.approx(4 * 2048 * 2304**2 / 67e12)


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


def counted(model: Any, folder: Path, sizes: tuple[int, int], fields: dict[str, Any]) -> Any:
    """A run of a few steps: bytes of the third by group, and of one pass of the model; None where
    each process draws all activations."""
    steps = []
    take = ShardTrainer.step

    def counting(self: Any, batch: Any) -> Any:
        traffic = self.sae.processes.mesh.traffic
        before = traffic.copy()
        output = take(self, batch)
        steps.append(traffic - before)
        return output

    ShardTrainer.step = counting  # type: ignore[method-assign]
    with joined(*sizes, "cpu") as launch:
        runner = ShardedTrainingRunner(
            launch,
            run_of_one_pass_a_step(folder, **fields),
            override_model=model,
            override_dataset=token_rows(),
            check_first=False,
        )
        runner.metrics_path = None
        runner.run()
        if runner.harvest is None:
            return steps[2], None
        store, before = runner.activations_store, runner.harvest.sent
        draw = store.get_activations
        if isinstance(store, PairStore):
            draw = store.get_multi_hook_activations
        draw(store.get_batch_tokens())
        return steps[2], runner.harvest.sent - before


def run_of_one_pass_a_step(folder: Path, **fields: Any) -> Any:
    """A step trains on as many tokens as one pass of the model gives."""
    prompts = fields.get("store_batch_size_prompts", 6)
    batch = prompts * CONTEXT
    given = {
        "store_batch_size_prompts": prompts,
        "train_batch_size_tokens": batch,
        "training_tokens": 4 * batch,
        "lr_decay_steps": 1,
        "exclude_special_tokens": False,
        "checkpoint_path": None,
        "n_checkpoints": 0,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1000),
        **fields,
    }
    return small(folder, **given)


def transcoder(skip: bool) -> dict[str, Any]:
    return {
        "sae": transcoder_config(skip, d_sae=60, step_kernel="sparse"),
        "hook_name": f"blocks.1.{LN}",
    }


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((2, 1), {}),
        ((2, 1), transcoder(skip=False)),
        ((2, 1), transcoder(skip=True)),
        ((1, 2), {"store_batch_size_prompts": 1}),
        ((1, 2), {"store_batch_size_prompts": 7}),
        ((2, 1), {"prefetch_llm_batches": 2}),
    ],
    ids=["SAE", "transcoder", "skip transcoder", "one prompt", "seven prompts", "prefetch"],
)
def test_a_plan_has_the_bytes_that_a_run_hands_over(
    sizes: tuple[int, int], fields: dict[str, Any], model: Any, tmp_path: Path, one_thread: None
) -> None:
    cfg = run_of_one_pass_a_step(tmp_path, **fields)
    found = planning.plan(
        cfg,
        data_parallel_size=sizes[0],
        model_parallel_size=sizes[1],
        override_model=model,
        override_dataset=token_rows(),
    )
    predicted = dataclasses.asdict(found.traffic)
    harvest = predicted.pop("harvest")
    for step, one_pass in run_on(2, counted, tmp_path / "results", model, tmp_path, sizes, fields):
        assert step == {name: count for name, count in predicted.items() if count}
        assert harvest == (one_pass or 0)
        assert (one_pass is None) == bool(cfg.prefetch_llm_batches)


@pytest.mark.parametrize(
    ("fields", "severity", "message"),
    [
        (
            {"store_batch_size_prompts": 3},
            "warning",
            "store_batch_size_prompts is 3, and 4 processes .*: 1 of them repeat .* "
            "give --store_batch_size_prompts 4",
        ),
        (
            {"store_batch_size_prompts": 6},
            "note",
            "each runs 2 sequences of a pass, 8 together: give --store_batch_size_prompts 8",
        ),
        ({"prefetch_llm_batches": 2}, "note", "each of 4 processes runs the model on all"),
        ({"store_batch_size_prompts": 8}, None, ""),
    ],
    ids=str,
)
def test_work_that_processes_repeat_is_said(
    fields: dict[str, Any], severity: str | None, message: str, model: Any, tmp_path: Path
) -> None:
    report = plan(model, tmp_path, 2, 2, **fields).preflight
    said = [finding for finding in report.findings if finding.name == "passes"]
    assert [finding.severity for finding in said] == ([severity] if severity else [])
    assert all(re.search(message, str(finding)) for finding in said)


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_first_cannot_join_is_refused(
    device: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = 4 * dictionary_parameters(33, 33, 48)
    report = plan(model, tmp_path, 1, 2).preflight
    whole_run = report.saving
    assert plan(model, tmp_path, 1, 1).preflight.saving is None
    assert whole_run is not None
    assert 3 * whole < whole_run.working < 4 * whole + whole_run.buffer
    kept = plan(model, tmp_path, 1, 2, checkpoint_path=None, n_checkpoints=0).preflight.saving
    assert kept is not None and kept.working == 2 * whole  # the result alone
    cfg, shard = small(tmp_path), JumpReLUTrainingSAE(small(tmp_path, d_sae=24).sae)
    cfg.device = cfg.act_store_device = device  # nothing is computed there
    found = saving.saving_forecast(
        cfg, shard, model, width=33, division=Division(1, 2), saves_buffer=False
    )
    assert found is not None and found.device == "cpu"
    own = 2 * memory.parameter_bytes(shard)
    assert (found.optimizer, found.buffer > 0) == ((own, True) if device == "cpu" else (0, False))
    (refused,) = memory_findings(dataclasses.replace(found, available=found.peak - 1))
    assert refused.severity == "refused" and "the first process will take" in refused.message
    monkeypatch.setattr(saving, "available", lambda device: found.working)
    with pytest.raises(ValueError, match="the first process will take .* saves the whole dict"):
        plan(model, tmp_path, 1, 2).preflight.refuse()


def test_unknown_hardware_is_refused() -> None:
    with pytest.raises(ValueError, match="hardware is 'b7'; published figures are recorded for"):
        hardware("b7")


def test_the_page_is_what_the_arithmetic_says() -> None:
    text = many_gpus.PAGE.read_text()
    assert tables.fill(text, "mesh", many_gpus.BLOCKS) == text, "python -m benchmarks.many_gpus"
    assert all(f"<!-- mesh:{name} -->" in text for name in many_gpus.BLOCKS)
