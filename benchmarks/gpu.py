"""What a GPU makes of a training step: time, memory and kernels, beside the trainers it replaces.

    python -m benchmarks.gpu steps     whole steps at three shapes and at L0 10 to 1000
    python -m benchmarks.gpu clt       whole steps of a cross-layer transcoder
    python -m benchmarks.gpu profile   the time of each kernel in a step
    python -m benchmarks.gpu harvest   tokens a second through a model, with 0 to 8 dictionaries

`tools/gpu_check.sh` runs all of it. Each record is a line of JSON that names the device; it is
written as soon as it is measured. A part begins no measurement after its minutes are over.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu_clt import STEP_KERNELS, CLTShape, TimedCLT
from benchmarks.tables import terminal
from benchmarks.trainers import (
    AUTO,
    DEFAULT_CONFIG,
    DENSE,
    GPU_TRAINERS,
    SCREENED,
    SPARSE,
    SPARSIFY,
    STOCK,
    STOCK_AUTOCAST,
    STOCK_TF32,
    TOPK_SPARSE,
    TRAINERS,
    TRITON,
    Shape,
    TimedTrainer,
)
from jumprelu_plugin.records import append_jsonl, provenance
from jumprelu_plugin.step import product

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
PRODUCTS = {
    "one product, float32": "ieee",
    "one product, TF32": "tf32",
    "one product, bf16": "bf16",
}
AT_SHAPES = (
    *(TRITON, SCREENED, SPARSE, AUTO, DEFAULT_CONFIG, DENSE),
    *(STOCK, STOCK_TF32, STOCK_AUTOCAST, TOPK_SPARSE, SPARSIFY),
)
IN_SWEEP = (TRITON, SCREENED, SPARSE, STOCK, STOCK_TF32, STOCK_AUTOCAST)
# After 17 steps `auto` has timed every path.
WARM_UP = {AUTO: 18, DEFAULT_CONFIG: 18}
DICTIONARIES = (0, 1, 4, 8)

console = terminal()
app = typer.Typer(help=__doc__)
Device = Annotated[str, typer.Option(help="Where to run; cpu is for small sizes.")]
Small = Annotated[bool, typer.Option(help="Tiny sizes, to check that it runs.")]
Output = Annotated[Path, typer.Option(help="Records are added to this file.")]
Minutes = Annotated[float, typer.Option(help="No measurement begins after these.")]


@dataclass(frozen=True)
class Recorder:
    """Writes records as they are measured, until its time is over.

    Attributes:
        path: the file they are added to.
        device: where measurements run.
        ends: of the clock `time.monotonic`.
        origin: the provenance of every record.
    """

    path: Path
    device: str
    ends: float
    origin: dict[str, Any]

    @classmethod
    def of(cls, path: Path, device: str, minutes: float) -> Recorder:
        return cls(path, device, time.monotonic() + 60 * minutes, provenance(seed=0))

    def try_(self, case: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and record one case; what fails is recorded with its reason."""
        if time.monotonic() > self.ends:
            console.print(f"no time left for {case}")
            return
        try:
            found = measure()
        except (RuntimeError, ImportError, ValueError) as error:  # out of memory is a RuntimeError
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        record = {**case, **found, "device_name": device_name(self.device)}
        console.print(case, {name: v for name, v in found.items() if name != "seconds"})
        append_jsonl(self.path, {**record, "provenance": self.origin})
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()


def device_name(device: str) -> str:
    """The GPU's name; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def shapes(small: bool, device: str) -> tuple[list[Shape], list[Shape]]:
    """Those at which every trainer is timed, and those of the sweep over L0."""
    if small:
        return [Shape(13, 41, 17, 5, device)], [Shape(13, 41, 17, 11, device)]
    sizes = ((2304, 16384), (2304, 65536), (4096, 131072))
    sweep = [Shape(2304, 16384, 4096, l0, device) for l0 in (10, 30, 100, 300, 1000)]
    return [Shape(*size, 4096, 70, device) for size in sizes], sweep


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may run in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def timed(function: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each call, from an idle device to an idle device."""
    seconds = []
    for _ in range(repeats):
        product.synchronize(torch.device(device))
        started = time.perf_counter()
        function()
        product.synchronize(torch.device(device))
        seconds.append(time.perf_counter() - started)
    return seconds


def time_product(precision: str, shape: Shape, repeats: int) -> dict[str, Any]:
    """One product [batch, d_in] × [d_in, d_sae], the whole result written."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(shape.batch, shape.d_in, device=shape.device).to(dtype)
    w = torch.randn(shape.d_sae, shape.d_in, device=shape.device).to(dtype)
    with tf32(precision == "tf32"):
        timed(lambda: a @ w.t(), shape.device, 3)
        seconds = timed(lambda: a @ w.t(), shape.device, repeats)
    return {"seconds": seconds, "median_seconds": statistics.median(seconds)}


def time_trainer(name: str, shape: Shape, repeats: int) -> dict[str, Any]:
    """The steps of a trainer at a shape, and the path it took."""
    torch.manual_seed(0)
    with tf32(name == STOCK_TF32):
        trainer: TimedTrainer = (TRAINERS | GPU_TRAINERS)[name](shape)
        found = time_steps(trainer, shape.device, shape.batch, WARM_UP.get(name, 3), repeats)
    choice = getattr(getattr(trainer, "sae", None), "path_choice", None)
    return {**found, "path": getattr(choice, "current", None)}


def time_steps(
    trainer: TimedTrainer, device: str, batch: int, warm_up: int, repeats: int
) -> dict[str, Any]:
    """Whole steps, forward and backward alone, and the peak memory of both."""
    for _ in range(warm_up):
        trainer.step()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(trainer.step, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    passes = timed(trainer.forward_backward, device, max(2, repeats // 2))
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": batch / median,
        "forward_backward_seconds": statistics.median(passes),
        "peak_bytes": peak,
        "measured_l0": trainer.l0(),
    }


@app.command()
def steps(
    device: Device = "cuda", small: Small = False, output: Output = RESULTS, minutes: Minutes = 9.0
) -> None:
    """Whole steps of every trainer."""
    recorder, repeats = Recorder.of(output, device, minutes), 2 if small else 10
    every, sweep = shapes(small, device)
    plan = [("shapes", shape, AT_SHAPES) for shape in every]
    plan += [("l0", shape, IN_SWEEP) for shape in sweep]
    for part, shape, trainers in plan:
        if part == "shapes":
            for name, precision in PRODUCTS.items():
                case = {"part": part, "trainer": name, **asdict(shape)}
                recorder.try_(case, lambda p=precision, s=shape: time_product(p, s, repeats))
        for name in trainers:
            case = {"part": part, "trainer": name, **asdict(shape)}
            recorder.try_(case, lambda n=name, s=shape: time_trainer(n, s, repeats))


@app.command()
def clt(
    device: Device = "cuda", small: Small = False, output: Output = RESULTS, minutes: Minutes = 1.0
) -> None:
    """Whole steps of a cross-layer transcoder by each of its step kernels."""
    recorder, repeats = Recorder.of(output, device, minutes), 2 if small else 5
    shape = CLTShape(6, 768, 16384, 2048, 40, device)
    if small:
        shape = CLTShape(2, 7, 11, 5, 3, device)
    for kernel in STEP_KERNELS:
        case = {"part": "clt", "trainer": f"train-clt, {kernel}", **asdict(shape)}
        recorder.try_(case, lambda k=kernel: time_clt(k, shape, repeats))


def time_clt(step_kernel: str, shape: CLTShape, repeats: int) -> dict[str, Any]:
    """The steps of a cross-layer transcoder."""
    torch.manual_seed(0)
    return time_steps(TimedCLT(shape, step_kernel), shape.device, shape.batch, 3, repeats)


def kernel_times(name: str, shape: Shape) -> dict[str, Any]:
    """Milliseconds of each kernel, or operator on a CPU, in one step; the longest first."""
    on_gpu = torch.device(shape.device).type == "cuda"
    with tf32(name == STOCK_TF32):
        trainer = (TRAINERS | GPU_TRAINERS)[name](shape)
        for _ in range(WARM_UP.get(name, 3)):
            trainer.step()
        with torch.profiler.profile() as profile:
            trainer.step()
            product.synchronize(torch.device(shape.device))
    spent: dict[str, float] = {}
    here = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    for event in profile.key_averages():
        # An operator and a named range are given the time of their kernels too: only kernels count.
        if event.device_type != here or event.is_user_annotation:
            continue
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if took > 0:
            spent[event.key] = spent.get(event.key, 0.0) + took / 1e3
    longest = sorted(spent.items(), key=lambda item: -item[1])[:25]
    return {"kernel_milliseconds": dict(longest), "all_milliseconds": sum(spent.values())}


@app.command()
def profile(
    device: Device = "cuda", small: Small = False, output: Output = RESULTS, minutes: Minutes = 2.0
) -> None:
    """The time of each kernel in a step, at each shape."""
    recorder = Recorder.of(output, device, minutes)
    for shape in shapes(small, device)[0]:
        for name in (TRITON, SCREENED, STOCK_TF32):
            case = {"part": "profile", "trainer": name, **asdict(shape)}
            recorder.try_(case, lambda n=name, s=shape: kernel_times(n, s))


class Harvest:
    """The first layers of a model of Gemma 2 2B's sizes with random weights, in bfloat16.

    Time depends on sizes alone, so no weights are needed.
    """

    def __init__(self, small: bool, device: str):
        from transformers import Gemma2Config, Gemma2Model

        sizes: dict[str, Any] = dict(num_hidden_layers=13, vocab_size=256000, hidden_size=2304)
        sizes |= dict(intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4)
        self.sequences, self.length = 4, 1024
        if small:
            sizes = dict(num_hidden_layers=2, vocab_size=97, hidden_size=24, intermediate_size=53)
            sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=12)
            self.sequences, self.length = 3, 17
        self.model = Gemma2Model(Gemma2Config(**sizes)).to(device, torch.bfloat16).eval()
        self.vocabulary, self.device = sizes["vocab_size"], device

    @torch.no_grad()
    def draw(self) -> torch.Tensor:
        """Activations of random tokens, [sequences·length, d_model] in float32."""
        shape = (self.sequences, self.length)
        tokens = torch.randint(self.vocabulary, shape, device=self.device)
        return self.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1).float()


def time_harvest(source: Harvest, dictionaries: int, d_sae: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of the model alone, or with dictionaries trained on what it gives."""
    drawn = source.draw()
    shape = Shape(drawn.shape[1], d_sae, len(drawn), 70 if d_sae > 1000 else 7, source.device)
    trainers = [TRAINERS[AUTO](shape) for _ in range(dictionaries)]

    def step() -> None:
        rows = source.draw()
        for trainer in trainers:
            trainer.x = rows  # type: ignore[attr-defined]
            trainer.step()

    for _ in range(WARM_UP[AUTO] if dictionaries else 2):
        step()
    seconds = timed(step, source.device, repeats)
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": len(drawn) / median,
    }


@app.command()
def harvest(
    device: Device = "cuda", small: Small = False, output: Output = RESULTS, minutes: Minutes = 3.0
) -> None:
    """Tokens a second through a model, and with 1, 4 and 8 dictionaries trained on them."""
    recorder, source = Recorder.of(output, device, minutes), Harvest(small, device)
    d_sae = 211 if small else 16384
    for count in DICTIONARIES:
        case = {"part": "harvest", "dictionaries": count, "d_sae": d_sae}
        recorder.try_(case, lambda n=count: time_harvest(source, n, d_sae, 2 if small else 10))


if __name__ == "__main__":
    app()
