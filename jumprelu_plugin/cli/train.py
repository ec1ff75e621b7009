"""Training on SAELens' flags: `jumprelu train`, `train-many`, `check`, `finetune`, `recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jumprelu_plugin.cli.console import console

app = typer.Typer()

# SAELens' flags, and --help among them, are for SAELens' parser.
SAELENS_FLAGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="start from a recipe; `jumprelu recipes` lists them.")
]
SaveBuffer = Annotated[
    bool,
    typer.Option(
        "--save_buffer/--no_save_buffer",
        help="whether checkpoints hold the mixing buffer, for an exact resume. Default: yes.",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="folder of an activation cache to read, from `jumprelu cache-activations`.",
    ),
]
CheckpointMinutes = Annotated[
    float,
    typer.Option(
        "--checkpoint_every_n_minutes",
        help="minutes between two checkpoints beside those of --n_checkpoints; the last two are "
        "kept until the SAE is saved; 0: none. Default: 10.",
    ),
]
CheckFirst = Annotated[
    bool,
    typer.Option(
        "--check_first/--no_check_first",
        help="whether to check the run first, as `jumprelu check` does. Default: yes.",
    ),
]
CheckOnly = Annotated[
    bool,
    typer.Option(
        "--check_only/--no_check_only",
        help="whether to check the run, say what was found, and stop. Default: no.",
    ),
]
DataParallelSize = Annotated[
    int,
    typer.Option(
        "--data_parallel_size",
        help="processes, or groups of them, over which each batch of tokens is split; times "
        "--model_parallel_size it is the number of processes. Default: 1.",
    ),
]
ModelParallelSize = Annotated[
    int,
    typer.Option(
        "--model_parallel_size",
        help="processes over which the latents are sharded: torchrun --nproc-per-node N -m "
        "jumprelu_plugin … --model_parallel_size N. Default: 1.",
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="a100, h100 or h200: whose published figures the times of a step on many GPUs follow "
        "from. Default: this machine's GPU, or h100.",
    ),
]


@app.command(context_settings=SAELENS_FLAGS)
def train(
    context: typer.Context,
    recipe: RecipeName = None,
    activations: Activations = None,
    save_buffer: SaveBuffer = True,
    checkpoint_every_n_minutes: CheckpointMinutes = 10.0,
    check_first: CheckFirst = True,
    data_parallel_size: DataParallelSize = 1,
    model_parallel_size: ModelParallelSize = 1,
) -> None:
    """Train an SAE or a transcoder with SAELens' own runner flags, plus our fields.

    --model_name takes a hub name, a model folder, or tiny-gemma-2. An empty --dataset_path is the
    text of the `demo` extra. Interrupted (Ctrl-C), it saves a checkpoint and exits with 130.
    --resume_from_checkpoint auto goes on from the newest whole checkpoint of the same run.
    """
    from jumprelu_plugin.training.distributed.launch import is_one_of_many
    from jumprelu_plugin.training.distributed.runner import train_sharded
    from jumprelu_plugin.training.runner import JumpReLUTrainingRunner

    cfg = _run_config(context, recipe)
    options: dict[str, Any] = {
        "save_buffer": save_buffer,
        "check_first": check_first,
        "checkpoint_every_n_minutes": checkpoint_every_n_minutes,
        "activations": activations,
    }
    if (data_parallel_size, model_parallel_size) != (1, 1) or is_one_of_many():
        train_sharded(
            cfg,
            data_parallel_size=data_parallel_size,
            model_parallel_size=model_parallel_size,
            **options,
        )
    else:
        JumpReLUTrainingRunner(cfg, **options).run()


@app.command(context_settings=SAELENS_FLAGS)
def train_many(
    context: typer.Context,
    dictionaries: Annotated[
        Path | None,
        typer.Option(
            "--dictionaries",
            help="YAML file with what the dictionaries have of their own: a mapping of flags to "
            "lists of values, or a list of such mappings, which may have a name.",
        ),
    ] = None,
    recipe: RecipeName = None,
    save_buffer: SaveBuffer = True,
    checkpoint_every_n_minutes: CheckpointMinutes = 10.0,
    check_first: CheckFirst = True,
    check_only: CheckOnly = False,
) -> None:
    """Train several SAEs in one pass over the text, on one harvest. Flags as for train.

    A flag of the SAE's config, --hook_name, --architecture, --seed and those of the learning rate
    take several values with commas, such as --target_l0 20,40 --d_sae 4096,16384: every combination
    is trained. --d_in follows from each hook. Each SAE becomes a folder below --output_path.
    """
    from functools import partial

    from jumprelu_plugin.cli.varied_flags import read_dictionaries
    from jumprelu_plugin.training.distributed.launch import is_one_of_many
    from jumprelu_plugin.training.multi.runner import train_many

    if is_one_of_many():
        raise ValueError(
            "train-many trains in one process: start it without torchrun, or train one dictionary "
            "over many processes with `jumprelu train`"
        )
    command = _command(context, "jumprelu train-many")
    train_many(
        partial(read_dictionaries, context.args, dictionaries, recipe, command),
        check_only=check_only,
        log=console.print,
        save_buffer=save_buffer,
        check_first=check_first,
        checkpoint_every_n_minutes=checkpoint_every_n_minutes,
    )


@app.command(context_settings=SAELENS_FLAGS)
def check(
    context: typer.Context,
    recipe: RecipeName = None,
    activations: Activations = None,
    save_buffer: SaveBuffer = True,
    checkpoint_every_n_minutes: CheckpointMinutes = 10.0,
    check_first: CheckFirst = True,
    data_parallel_size: DataParallelSize = 1,
    model_parallel_size: ModelParallelSize = 1,
    hardware: Hardware = None,
) -> None:
    """Check a run before it starts: memory, windows, what it can reach. Flags as for train.

    With --no_check_first it repairs nothing, as train would not.
    With --data_parallel_size or --model_parallel_size it says what each process takes and what they
    exchange, without starting them. Exits with 2 if the run would be refused. Writes nothing.
    """
    from jumprelu_plugin.training.runner import JumpReLUTrainingRunner

    cfg = _run_config(context, recipe)
    options: dict[str, Any] = {
        "save_buffer": save_buffer,
        "check_first": check_first,
        "checkpoint_every_n_minutes": checkpoint_every_n_minutes,
    }
    if (data_parallel_size, model_parallel_size, hardware) == (1, 1, None):
        report = JumpReLUTrainingRunner(cfg, activations=activations, **options).preflight()
    else:
        from jumprelu_plugin.training.distributed.planning import plan

        if activations is not None:
            raise ValueError("activations is not taken on many processes: leave it out")
        found = plan(
            cfg,
            data_parallel_size=data_parallel_size,
            model_parallel_size=model_parallel_size,
            gpu=hardware,
            **options,
        )
        console.print(found.table())
        report = found.preflight
    console.print(report.table())
    if report.of("refused"):
        raise typer.Exit(2)


@app.command(context_settings=SAELENS_FLAGS)
def finetune(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="folder of an SAE, or Gemma Scope's params.npz.")],
    save_buffer: SaveBuffer = True,
    checkpoint_every_n_minutes: CheckpointMinutes = 10.0,
) -> None:
    """Train a released SAE further: jumprelu finetune SOURCE, then the flags of jumprelu train.

    Widths, hook, model and text are the SAE's own where its files say them. Without --target_l0
    and --l0_coefficient the training holds the L0 that the SAE has.
    """
    from jumprelu_plugin.cli.saelens_flags import (
        flag_names,
        normalized,
        parse_flags,
        with_a_batch_in_the_buffer,
    )
    from jumprelu_plugin.finetune.runner import FinetuningRunner, pretrained_flags

    command = _command(context, "jumprelu finetune SOURCE")
    if source in ("-h", "--help"):
        parse_flags([source], command)
    if source.startswith("-"):
        raise ValueError(f"give the SAE first: jumprelu finetune SOURCE, then {source} and others")
    given = normalized(context.args)
    flags = [*pretrained_flags(source, given), *given]
    _, cfg = with_a_batch_in_the_buffer(flags, flag_names(given), command)
    FinetuningRunner(
        source,
        cfg,
        save_buffer=save_buffer,
        checkpoint_every_n_minutes=checkpoint_every_n_minutes,
        log=console.print,
    ).run()


@app.command()
def recipes() -> None:
    """List the training recipes and where their numbers come from."""
    from jumprelu_plugin.recipes import RECIPES

    for recipe in RECIPES.values():
        console.rule(f"[bold]{recipe.name}[/]", align="left")
        console.print(f"{recipe.description}\n[dim]{recipe.source}[/]\n")
        numbers = Table.grid(padding=(0, 2))
        for name, value in recipe.field_values().items():
            numbers.add_row(f"  {name}", value)
        console.print(numbers, "")


def _run_config(context: typer.Context, recipe: str | None) -> Any:
    from jumprelu_plugin.cli.saelens_flags import run_config

    return run_config(context.args, recipe, _command(context, f"jumprelu {context.info_name}"))


def _command(context: typer.Context, usage: str) -> Any:
    from jumprelu_plugin.cli.saelens_flags import Command

    return Command(usage, context.command.help or "", context.command.params)
