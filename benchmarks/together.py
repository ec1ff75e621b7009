"""The time of SAEs trained together against as many trained one after another.

    OMP_NUM_THREADS=2 python -m benchmarks.together            eight SAEs, (576, 8192, 2048)
    OMP_NUM_THREADS=2 python -m benchmarks.together --model smollm2-135m   with their harvest
    OMP_NUM_THREADS=2 python -m benchmarks.together --quick    small sizes, to check that it runs
    OMP_NUM_THREADS=1 python -m benchmarks.together --profile  where the time of one step goes

Both ways take turns on the same SAEs, a few steps of each at a time, so that whatever else the
machine does slows both alike. Alone, each SAE reads its own batches and its step uses all threads,
as in a run of its own; together, they share the batches and the threads. With a model, its forward
pass over one batch takes its turn too: a run of its own makes it for each SAE, a sweep for all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import CONTEXT, MODELS
from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.studies.sweep.together import JointSteps
from jumprelu_plugin.studies.sweep.training import SAETraining, batches, trainer_config

RESULTS = Path(__file__).parent / "results" / "together.jsonl"
L0S = (10, 20, 40, 80)
# The path is set, so that no step is spent on choosing it; `auto` chooses it at this size.
KERNEL = "screened"


def rows(d_in: int, count: int) -> Tensor:
    """Sums of a few of 4·d_in random directions, with a mean: [count, d_in]."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    made = []
    for _ in range(0, count, 1024):
        # About 30 of them a token, some often and most seldom.
        often = torch.logspace(0, -2, len(directions)) * 30 / 0.21 / len(directions)
        strength = torch.rand(1024, len(directions), generator=generator)
        present = torch.rand(1024, len(directions), generator=generator) < often
        made.append((strength * present) @ directions)
    return torch.cat(made)[:count] + 3.0


def harvest_of(name: str, batch: int) -> tuple[int, Callable[[], object]]:
    """The width of a model's first reported site, and a function that harvests one batch there."""
    model = MODELS[name]
    sites = model.sites[:1]
    sequences = batch // CONTEXT
    width = model.activations(sites, "train", 1)[sites[0]].shape[1]
    model.tokens("train", sequences)  # tokenized once
    return width, lambda: model.activations(sites, "train", sequences)


def training(place: int, data: Tensor, d_sae: int, batch: int) -> SAETraining:
    """The SAE at a place: the L0s in turn, and another seed each time round."""
    torch.manual_seed(place)
    d_in = data.shape[1]
    cfg = DEFAULT.sae_config(d_in, d_sae, target_l0=L0S[place % len(L0S)], step_kernel=KERNEL)
    sae = JumpReLUTrainingSAE(cfg)
    trainer = trainer_config(10**6, batch, DEFAULT.learning_rate(cfg, 1_000 * batch, batch))
    return SAETraining(sae, trainer, batches(data, batch, seed=0))


def machine_seconds() -> float | None:
    """CPU seconds of all processes since the start of the machine (proc(5)); None if not Linux."""
    try:
        user, nice, system, _, _, irq, softirq = map(
            int, Path("/proc/stat").read_text().split()[1:8]
        )
    except OSError:
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(
    count: int,
    d_in: int,
    d_sae: int,
    batch: int,
    warm_up: int,
    seconds: float,
    harvest: Callable[[], object] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Seconds and CPU seconds that both ways take for one step of every SAE, and the share of the
    machine's cores that other processes had meanwhile.

    Args:
        count: SAEs.
        warm_up: steps of each before the first that is timed.
        seconds: how long both take turns.
        harvest: makes the activations of one batch; takes its turn where it is given.
    """
    data = rows(d_in, 8 * batch)
    trainings = [training(place, data, d_sae, batch) for place in range(count)]
    alone = [batches(data, batch, seed=0) for _ in trainings]
    joint = JointSteps(trainings, [batches(data, batch, seed=0)] * count)
    joint.take(until=warm_up)

    def take_alone() -> None:
        for one, source in zip(trainings, alone, strict=True):
            one.step(next(source))

    def take_together() -> None:
        joint.take(until=trainings[0].steps + 1)

    ways: dict[str, Callable[[], object]] = {"alone": take_alone, "together": take_together}
    if harvest is not None:
        harvest()
        ways["harvest"] = harvest
    found = {name: {"seconds": [], "cpu_seconds": [], "others": []} for name in ways}
    print(f"warmed up; {', '.join(ways)} take turns for {seconds:.0f} s", flush=True)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, take in ways.items():
            wall, cpu, all_cpu = time.perf_counter(), time.process_time(), machine_seconds()
            take()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found[name]["seconds"].append(wall)
            found[name]["cpu_seconds"].append(cpu)
            if all_cpu is not None and (now := machine_seconds()) is not None:
                others = max(0.0, now - all_cpu - cpu) / (wall * (os.cpu_count() or 1))
                found[name]["others"].append(others)
    return found


def shares(d_in: int, d_sae: int, batch: int, steps: int = 5) -> list[dict[str, Any]]:
    """PyTorch's operators in one SAE's step, by their own time, with it in milliseconds a step."""
    data = rows(d_in, 8 * batch)
    one, source = training(2, data, d_sae, batch), batches(data, batch, seed=0)
    for _ in range(8):
        one.step(next(source))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            one.step(next(source))
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operator": event.key,
            "calls": event.count // steps,
            "milliseconds": event.self_cpu_time_total / steps / 1e3,
            "share": event.self_cpu_time_total / total,
        }
        for event in events[:25]
    ]


def main(
    quick: Annotated[bool, typer.Option(help="Small sizes, to check that it runs.")] = False,
    where: Annotated[bool, typer.Option("--profile", help="Profile one SAE's step.")] = False,
    seconds: Annotated[float, typer.Option(help="How long both ways take turns.")] = 60.0,
    count: Annotated[int, typer.Option(help="SAEs.")] = 8,
    model: Annotated[str | None, typer.Option(help="Whose forward pass takes its turn.")] = None,
    output: Annotated[Path | None, typer.Option(help="Records are added to this file.")] = None,
) -> None:
    """Time both ways, or profile a step, and add one record."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    d_in, d_sae, batch = (48, 512, 256) if quick else (576, 8192, 2048)
    harvest = None
    if model is not None:
        d_in, harvest = harvest_of(model, batch)
    sizes = {"d_in": d_in, "d_sae": d_sae, "batch": batch, "l0s": list(L0S)}
    record: dict[str, Any] = {**sizes, "threads": torch.get_num_threads()}
    record |= {"model": model}
    if where:
        found = shares(d_in, d_sae, batch)
        for line in found[:12]:
            print(f"{line['operator']:40} {line['milliseconds']:8.1f} ms {line['share']:6.1%}")
        record |= {"measured": "profile", "operators": found}
    else:
        times = measure(count, d_in, d_sae, batch, 3, 1.0 if quick else seconds, harvest)
        medians = {
            name: {kind: statistics.median(values) for kind, values in kinds.items()}
            for name, kinds in times.items()
        }
        ratio = medians["together"]["seconds"] / medians["alone"]["seconds"]
        record |= {"measured": "times", "saes": count, "times": times, "ratio": ratio}
        print(medians)
        print(f"{count} SAEs together take {ratio:.2f} of the time of {count} alone")
        if harvest is not None:
            once = medians["harvest"]["seconds"]
            together = once + medians["together"]["seconds"]
            record["ratio_of_runs"] = together / (count * once + medians["alone"]["seconds"])
            print(f"with the harvest, {record['ratio_of_runs']:.2f} of {count} runs")
    append_jsonl(
        output or (RESULTS.with_stem("together_quick") if quick else RESULTS),
        {**record, "provenance": provenance(seed=0)},
    )


if __name__ == "__main__":
    typer.run(main)
