"""Training on many layers at once: `jumprelu train-transcoders` and `train-clt`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jumprelu_plugin.cli.console import console
from jumprelu_plugin.cli.generated import with_dataclass_options
from jumprelu_plugin.cli.train import CheckOnly, DataParallelSize, ModelParallelSize
from jumprelu_plugin.transcoders.settings import CLTSettings, TranscoderSettings

if TYPE_CHECKING:
    from jumprelu_plugin.transcoders.planning import LayerPlan

app = typer.Typer()

CheckedHardware = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="a100, h100 or h200: with --check_only, whose published memory and rates the run is "
        "held against. Default: this machine's memory, and the rates of its GPU or an h100.",
    ),
]


@app.command()
@with_dataclass_options
def train_transcoders(
    output_path: Annotated[
        Path, typer.Option("--output_path", help="folder for layer_0, layer_1, … and a record.")
    ],
    settings: TranscoderSettings,
    check_only: CheckOnly = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            help="with --check_only: how many processes torchrun would start. Default: 1.",
        ),
    ] = None,
    hardware: CheckedHardware = None,
) -> None:
    """Train one transcoder a layer in a single pass over the text.

    Interrupted, the same command goes on where it stopped. torchrun --nproc-per-node N -m
    jumprelu_plugin train-transcoders … deals the layers over N processes.
    """
    from jumprelu_plugin.training.distributed.launch import is_one_of_many
    from jumprelu_plugin.transcoders.per_layer.many_processes import train_dealt_transcoders
    from jumprelu_plugin.transcoders.per_layer.planning import plan_transcoders
    from jumprelu_plugin.transcoders.per_layer.run import train_transcoders

    if check_only:
        count = 1 if processes is None else processes
        _say(plan_transcoders(output_path, settings, processes=count, gpu=hardware))
        return
    if processes is not None:
        raise ValueError(
            "processes is what --check_only looks at: add it, or leave processes out, and start "
            "them with torchrun --nproc-per-node"
        )
    _refuse_hardware(hardware)
    if is_one_of_many():
        train_transcoders = train_dealt_transcoders
    console.print(f"written: {train_transcoders(output_path, settings, log=console.print)}")


@app.command()
@with_dataclass_options
def train_clt(
    output_path: Annotated[
        Path, typer.Option("--output_path", help="folder for the transcoder and a record.")
    ],
    settings: CLTSettings,
    data_parallel_size: DataParallelSize = 1,
    model_parallel_size: ModelParallelSize = 1,
    check_only: CheckOnly = False,
    hardware: CheckedHardware = None,
) -> None:
    """Train a cross-layer transcoder: latents of each layer write to all later MLP outputs.

    Interrupted, the same command goes on where it stopped. torchrun --nproc-per-node N -m
    jumprelu_plugin train-clt … --model_parallel_size N shards the latents over N processes.
    """
    from jumprelu_plugin.training.distributed.launch import is_one_of_many
    from jumprelu_plugin.transcoders.clt.many_processes import train_sharded_clt
    from jumprelu_plugin.transcoders.clt.planning import plan_clt
    from jumprelu_plugin.transcoders.clt.run import train_clt

    sizes = {"data_parallel_size": data_parallel_size, "model_parallel_size": model_parallel_size}
    if check_only:
        _say(plan_clt(output_path, settings, **sizes, gpu=hardware))
        return
    _refuse_hardware(hardware)
    if (data_parallel_size, model_parallel_size) != (1, 1) or is_one_of_many():
        train_clt = partial(train_sharded_clt, **sizes)
    console.print(f"written: {train_clt(output_path, settings, log=console.print)}")


def _refuse_hardware(hardware: str | None) -> None:
    if hardware is not None:
        raise ValueError("hardware is what --check_only looks at: add it, or leave hardware out")


def _say(plan: LayerPlan) -> None:
    console.print(plan.table())
    plan.refuse()
