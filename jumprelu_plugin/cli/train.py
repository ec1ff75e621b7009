"""Training on SAELens' own flags: `jumprelu train`, `check`, `finetune`, and the `recipes`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from jumprelu_plugin.cli.console import console

app = typer.Typer()


# What SAELens' own parser is to read, --help among it.
SAELENS_FLAGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


@app.command(context_settings=SAELENS_FLAGS)
def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="Start from a recipe's fields.")] = None,
    save_buffer: Annotated[
        bool, typer.Option(help="Checkpoints hold the mixing buffer, for an exact resume.")
    ] = True,
    check_first: Annotated[
        bool, typer.Option(help="Look at the run first; see `jumprelu check`.")
    ] = True,
) -> None:
    """Train with SAELens' own runner flags (--help lists them), plus our fields.

    --model_name takes a hub name, a model folder, or tiny-gemma-2. --architecture is jumprelu where
    it is not given. Interrupted (Ctrl-C), it saves a checkpoint and exits with 130.
    """
    from jumprelu_plugin.training.runner import JumpReLUTrainingRunner

    cfg = _run_config(context.args, recipe)
    JumpReLUTrainingRunner(cfg, save_buffer=save_buffer, check_first=check_first).run()


def _run_config(given: list[str], recipe: str | None) -> Any:
    """SAELens' config from its own flags, and from a recipe's where they leave something out."""
    from jumprelu_plugin.cli.saelens_flags import parse_flags
    from jumprelu_plugin.recipes import get_recipe

    defaults = [] if "--architecture" in given else ["--architecture", "jumprelu"]
    chosen = None if recipe is None else get_recipe(recipe)
    # The user's own flags come last, and the last one counts.
    cfg = parse_flags([*defaults, *([] if chosen is None else chosen.flags()), *given])
    if chosen is not None:
        chosen.adapt_to_run(cfg, given)
    return cfg


@app.command(context_settings=SAELENS_FLAGS)
def check(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="Start from a recipe's fields.")] = None,
) -> None:
    """Look at a run before it starts: memory, windows, what it can reach. Flags as for train.

    Exits with 2 if the run would be refused. Writes nothing.
    """
    from jumprelu_plugin.training.runner import JumpReLUTrainingRunner

    report = JumpReLUTrainingRunner(_run_config(context.args, recipe)).preflight()
    console.print(report.table())
    if report.of("refused"):
        raise typer.Exit(2)


@app.command(
    "finetune",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def finetune(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder of an SAE, or Gemma Scope's params.npz.")],
    save_buffer: Annotated[
        bool, typer.Option(help="Checkpoints hold the mixing buffer, for an exact resume.")
    ] = True,
) -> None:
    """Train a released SAE further: jumprelu finetune SOURCE, then the flags of jumprelu train.

    Widths, hook and model are the SAE's own where its files say them. Without --target_l0 and
    --l0_coefficient the L0 it has is held.
    """
    from jumprelu_plugin.cli.saelens_flags import parse_flags
    from jumprelu_plugin.finetune.runner import FinetuningRunner, pretrained_flags

    if source.startswith("-"):
        if source == "--help":
            parse_flags([source])
        raise ValueError(f"give the SAE first: jumprelu finetune SOURCE, then {source} and others")
    given = context.args
    cfg = parse_flags(["--architecture", "jumprelu", *pretrained_flags(source, given), *given])
    FinetuningRunner(source, cfg, save_buffer=save_buffer, log=console.print).run()


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
