"""The time of dictionaries trained in one run against as many runs of one each.

    OMP_NUM_THREADS=2 python -m benchmarks.train_many            one, two and four dictionaries
    OMP_NUM_THREADS=2 python -m benchmarks.train_many --quick    small sizes, to check that it runs

The model is the embedded one, loaded once for all runs, which favors the runs of one. Everything
else is in the time: building the run, drawing activations, training, saving. The dictionaries sit
at one hook, with target L0s 10, 20, 40 and 80.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from jumprelu_plugin import (
    JumpReLUMultiTrainingRunner,
    JumpReLUTrainingRunner,
    corpus,
    load_model,
    tokenized_dataset,
)
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import append_jsonl, provenance

RESULTS = Path(__file__).parent / "results" / "train_many.jsonl"
HOOK, D_IN, CONTEXT, BATCH = "blocks.3.hook_resid_post", 256, 128, 2048
L0S = (10, 20, 40, 80)


def config(folder: Path, target_l0: int, d_sae: int, steps: int) -> Any:
    """The run of one dictionary."""
    # The path is set, so that no step is spent on choosing it.
    sae = DEFAULT.sae_config(D_IN, d_sae, target_l0=target_l0, step_kernel="sparse")
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny-gemma-2",
        hook_name=HOOK,
        training_tokens=steps * BATCH,
        train_batch_size_tokens=BATCH,
        context_size=CONTEXT,
        n_batches_in_buffer=64,
        n_batches_for_norm_estimate=2,
        exclude_special_tokens=True,
        lr=DEFAULT.learning_rate(sae, steps * BATCH, BATCH),
        lr_decay_steps=DEFAULT.lr_decay_steps(steps),
        checkpoint_path=None,
        output_path=str(folder),
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )


def measure(counts: tuple[int, ...], d_sae: int, steps: int) -> list[dict[str, Any]]:
    """Seconds of each way, for each number of dictionaries; a warm-up run is not counted."""
    model = load_model("tiny-gemma-2")
    text = tokenized_dataset(model.tokenizer, CONTEXT, "train", corpus()[:400])

    def seconds(l0s: tuple[int, ...], together: bool, steps: int = steps) -> float:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            start = time.perf_counter()
            if together:
                configs = {f"l0_{l0}": config(folder, l0, d_sae, steps) for l0 in l0s}
                JumpReLUMultiTrainingRunner(configs, text, model, check_first=False).run()
            else:
                (l0,) = l0s
                cfg = config(folder, l0, d_sae, steps)
                JumpReLUTrainingRunner(cfg, text, model, check_first=False).run()
            return time.perf_counter() - start

    seconds(L0S[:1], False, 2)
    alone = [seconds((l0,), False) for l0 in L0S[: max(counts)]]
    return [
        {
            "dictionaries": count,
            "d_sae": d_sae,
            "steps": steps,
            "one_run": seconds(L0S[:count], True),
            "single_runs": sum(alone[:count]),
        }
        for count in counts
    ]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="small sizes.")] = False,
    d_sae: Annotated[int, typer.Option("--d_sae", help="latents of each.")] = 2048,
    steps: Annotated[int, typer.Option("--steps", help="of each run.")] = 40,
    output: Annotated[Path, typer.Option("--output", help="JSON lines.")] = RESULTS,
) -> None:
    """Measure, print and record."""
    found = measure((1, 2), 64, 3) if quick else measure((1, 2, 4), d_sae, steps)
    for each in found:
        one, several = each["one_run"], each["single_runs"]
        typer.echo(
            f"{each['dictionaries']} dictionaries: {one:.1f} s in one run, {several:.1f} s in "
            f"runs of one ({several / one:.2f} times as long)"
        )
        if not quick:
            append_jsonl(output, {"kind": "train_many", **each, "provenance": provenance(seed=0)})


if __name__ == "__main__":
    typer.run(main)
