"""Studies over many SAEs: `jumprelu cache-activations`, `sweep` and `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.cli.generated import with_dataclass_options
from jumprelu_plugin.cli.values import names_and_values
from jumprelu_plugin.models.number_lists import numbers, whole_numbers
from jumprelu_plugin.training.activations.cache.settings import CacheSettings

# Written out, because importing the architectures takes seconds that --help need not.
NAMES = (
    "jumprelu-plugin",
    "standard",
    "gated",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
)
app = typer.Typer()


@app.command()
@with_dataclass_options
def cache_activations(
    output_path: Annotated[Path, typer.Option("--output_path", help="folder for the activations.")],
    hook_names: Annotated[
        str,
        typer.Option("--hook_names", help="hooks whose activations are kept.", metavar="HOOK,HOOK"),
    ],
    settings: CacheSettings,
) -> None:
    """Write activations of several hooks to disk, for `jumprelu train --activations`.

    The size is announced and checked against the disk before the model runs. Interrupted, the same
    command goes on where it stopped.
    """
    from jumprelu_plugin.training.activations.cache.settings import cache_activations

    cache_activations(output_path, hook_names.split(","), settings, log=console.print)
    console.print(f"written: {output_path}", highlight=False)


@app.command()
def sweep(
    output_path: Annotated[
        Path,
        typer.Option("--output_path", help="folder for activations, SAEs and records."),
    ],
    grid: Annotated[
        Path | None, typer.Argument(help="YAML file with the fields below; flags count before it.")
    ] = None,
    architectures: Annotated[
        str | None, typer.Option("--architectures", help=f"of {', '.join(NAMES)}.", metavar="A,B")
    ] = None,
    l0: Annotated[str | None, typer.Option("--l0", help="target L0s.", metavar="20,40")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="of initialization and order.", metavar="0,1|0-3")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option("--sites", help="residual, mlp, attention.", metavar="SITE,SITE"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="layers of these sites.", metavar="0,1|0-5")
    ] = None,
    hook_names: Annotated[
        str | None,
        typer.Option("--hook_names", help="hooks beside those.", metavar="HOOK,HOOK"),
    ] = None,
    d_sae: Annotated[int | None, typer.Option("--d_sae", help="number of latents.")] = None,
    training_tokens: Annotated[
        int | None, typer.Option("--training_tokens", help="tokens that each SAE is trained on.")
    ] = None,
    train_batch_size_tokens: Annotated[
        int | None, typer.Option("--train_batch_size_tokens", help="tokens in a step.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="learning rate; in YAML also one for each architecture."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model_name", help="tiny-gemma-2, a folder, or a hub name.")
    ] = None,
    model_class_name: Annotated[
        str | None, typer.Option("--model_class_name", help="class of the hooked model.")
    ] = None,
    model_from_pretrained_kwargs: Annotated[
        str | None,
        typer.Option(
            "--model_from_pretrained_kwargs",
            help="keyword arguments of the model's loader, as JSON.",
            metavar='{"name": value}',
        ),
    ] = None,
    dataset_path: Annotated[
        str | None, typer.Option("--dataset_path", help="text. Default: the demo extra's.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="of the model's weights.")] = None,
    cached_tokens: Annotated[
        int | None,
        typer.Option("--cached_tokens", help="tokens of text to cache. Default: training_tokens."),
    ] = None,
    context_size: Annotated[
        int | None, typer.Option("--context_size", help="tokens in a sequence.")
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option("--cache_dtype", help="float32, bfloat16 or int8.")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option("--held_out", help="held-out sequences to evaluate on.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations", help="activation cache to read, with its model, text and context size."
        ),
    ] = None,
    train_together: Annotated[
        int | None,
        typer.Option("--train_together", help="SAEs of one hook trained at one time. Default: 8."),
    ] = None,
) -> None:
    """Train a grid of SAEs on shared activations, with one record for each.

    Interrupted, the same command goes on where it stopped; finished SAEs are not trained again.
    """
    from jumprelu_plugin.studies.sweep.grid import read_grid
    from jumprelu_plugin.studies.sweep.run import run_sweep

    given = {
        "architectures": _words(architectures),
        "l0": None if l0 is None else numbers("--l0", l0),
        "seeds": None if seeds is None else whole_numbers("--seeds", seeds),
        "sites": _words(sites),
        "layers": None if layers is None else whole_numbers("--layers", layers),
        "hook_names": _words(hook_names),
        "d_sae": d_sae,
        "training_tokens": training_tokens,
        "train_batch_size_tokens": train_batch_size_tokens,
        "lr": lr,
        "model_name": model_name,
        "model_class_name": model_class_name,
        "model_from_pretrained_kwargs": None
        if model_from_pretrained_kwargs is None
        else names_and_values("--model_from_pretrained_kwargs", model_from_pretrained_kwargs),
        "dataset_path": dataset_path,
        "device": device,
        "dtype": dtype,
        "cached_tokens": cached_tokens,
        "context_size": context_size,
        "cache_dtype": cache_dtype,
        "held_out": held_out,
        "activations": activations,
        "train_together": train_together,
    }
    settings = read_grid(grid, {name: value for name, value in given.items() if value is not None})
    console.print(f"records: {run_sweep(output_path, settings, console=console)}", highlight=False)


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


@app.command()
def plot(
    records: Annotated[
        list[Path],
        typer.Argument(help="folders or records of sweeps, of a study by a model or of ratings."),
    ],
    output_path: Annotated[
        Path, typer.Option("--output_path", help="folder for figures and report.html.")
    ],
) -> None:
    """Draw sweeps and studies as PNG and SVG, and as one HTML page that needs no network."""
    from jumprelu_plugin.studies.plot import plot_sweep

    console.print(f"written: {plot_sweep(records, output_path, log=console.print)}")
