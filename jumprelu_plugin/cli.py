"""The `jumprelu` command: one subcommand, one function; the work is done elsewhere."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup


class UserError(typer.BadParameter):
    """What the user can mend: said without a traceback, exit code 2."""

    def format_message(self) -> str:
        return self.message


class Commands(TyperGroup):
    """The subcommands, with their errors said as typer says a wrong option."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; JUMPRELU_TRACEBACK=1 keeps the traceback of an error."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, BrokenPipeError) or os.environ.get("JUMPRELU_TRACEBACK"):
                raise
            raise UserError(str(error)) from error
        except Exception as error:
            from sae_lens.training._interruption import InterruptedException

            if not isinstance(error, InterruptedException):
                raise
            typer.echo(error, err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, judge and use JumpReLU sparse autoencoders with SAELens.",
)
console = Console()


class Change(str, Enum):
    """What to do to a latent."""

    add = "add"
    clamp = "clamp"
    ablate = "ablate"


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("jumprelu-demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps; fewer is quicker.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train on the embedded Gemma 2, evaluate, look at latents, steer with one, save."""
    from jumprelu_plugin.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed) if steps is None else DemoSettings(seed=seed, steps=steps)
    run_demo(output, settings, console)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="Start from a recipe's fields.")] = None,
    save_buffer: Annotated[
        bool, typer.Option(help="Checkpoints hold the mixing buffer, for an exact resume.")
    ] = True,
) -> None:
    """Train with SAELens' own runner flags (--help lists them), plus our fields.

    --model_name takes a hub name, a model folder, or tiny-gemma-2. --architecture is jumprelu where
    it is not given. Interrupted (Ctrl-C), it saves a checkpoint and exits with 130.
    """
    from jumprelu_plugin.flags import parse_flags
    from jumprelu_plugin.recipes import recipe as find_recipe
    from jumprelu_plugin.runner import JumpReLUTrainingRunner

    given = context.args
    defaults = [] if "--architecture" in given else ["--architecture", "jumprelu"]
    if recipe is not None:
        defaults += find_recipe(recipe).flags()
    # The user's own flags come last, and the last one counts.
    JumpReLUTrainingRunner(parse_flags([*defaults, *given]), save_buffer=save_buffer).run()


@app.command()
def evaluate(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences to read.")] = 128,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    output: Annotated[Path | None, typer.Option(help="JSON record to write.")] = None,
) -> None:
    """Delta LM loss, FVU, L0, dead and dense latents of a saved SAE."""
    import torch

    from jumprelu_plugin import evaluation
    from jumprelu_plugin.models import model_digest
    from jumprelu_plugin.records import digest, provenance
    from jumprelu_plugin.text import tokenized_dataset

    dictionary, language_model = _load(sae, model)
    text = tokenized_dataset(language_model.tokenizer, context_size, "test")
    tokens = torch.tensor(text[:sequences]["tokens"])
    result = evaluation.evaluate(language_model, dictionary, tokens)
    console.print(result.table())
    if output is not None:
        record = provenance(model_digest=model_digest(language_model), data_digest=digest(tokens))
        console.print(f"written: {result.save(output, record)}")


@app.command()
def steer(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    latent: Annotated[int, typer.Option(help="Which latent.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    amount: Annotated[float, typer.Option(help="Added, or clamped to; activation units.")] = 20.0,
    change: Annotated[Change, typer.Option(help="What to do to the latent.")] = Change.add,
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt without and with a change to one latent."""
    from jumprelu_plugin import steering
    from jumprelu_plugin.demo import generate

    interventions = {
        Change.add: lambda: steering.Add(latent, amount),
        Change.clamp: lambda: steering.Clamp(latent, amount),
        Change.ablate: lambda: steering.Ablate(latent),
    }
    dictionary, language_model = _load(sae, model)
    without = generate(language_model, prompt, seed, tokens)
    with steering.steer(language_model, dictionary, interventions[change]()):
        changed = generate(language_model, prompt, seed, tokens)
    console.print("[bold]without[/]")
    console.print(without, markup=False, highlight=False)
    console.print(f"\n[bold]with[/] ({change.value} latent {latent})")
    console.print(changed, markup=False, highlight=False)


@app.command()
def recipes() -> None:
    """List the training recipes and where their numbers come from."""
    from jumprelu_plugin.recipes import RECIPES

    for recipe in RECIPES.values():
        console.rule(f"[bold]{recipe.name}[/]", align="left")
        console.print(f"{recipe.about}\n[dim]{recipe.source}[/]\n")
        numbers = Table.grid(padding=(0, 2))
        for name, value in {**recipe.sae, **recipe.runner}.items():
            numbers.add_row(f"  {name}", str(value))
        console.print(numbers, "")


def _load(sae_folder: Path, model_name: str | None) -> tuple[Any, Any]:
    """A saved SAE and the model it belongs to.

    Raises:
        ValueError: the folder holds no SAE, or the SAE does not say its model.
    """
    from sae_lens import SAE

    from jumprelu_plugin.models import load_model

    if not Path(sae_folder, "cfg.json").is_file():
        raise ValueError(f"{sae_folder} holds no SAE: there is no cfg.json in it")
    sae = SAE.load_from_disk(sae_folder)
    name = model_name or sae.cfg.metadata.model_name
    if not name:
        raise ValueError(f"the SAE in {sae_folder} does not say its model; give --model")
    return sae, load_model(name, "HookedSAETransformer")


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
