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


class Penalty(str, Enum):
    """What sparsity costs."""

    step = "step"
    tanh = "tanh"


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("jumprelu-demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps; fewer is quicker.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
) -> None:
    """Train on the embedded Gemma 2, evaluate, look at latents, steer with one, save."""
    from jumprelu_plugin.studies.demo import DemoSettings, run_demo

    settings = DemoSettings(seed=seed) if steps is None else DemoSettings(seed=seed, steps=steps)
    run_demo(output, settings, console)


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
        chosen.fit(cfg, given)
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
    from jumprelu_plugin.finetune.runner import FinetuningRunner, flags

    if source.startswith("-"):
        if source == "--help":
            parse_flags([source])
        raise ValueError(f"give the SAE first: jumprelu finetune SOURCE, then {source} and others")
    given = context.args
    cfg = parse_flags(["--architecture", "jumprelu", *flags(source, given), *given])
    FinetuningRunner(source, cfg, save_buffer=save_buffer, log=console.print).run()


@app.command()
def l0_sweep(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    l0: Annotated[str, typer.Option(help="L0s to refit to, such as 10,20,40.")],
    output: Annotated[Path, typer.Option(help="Folder for l0_10, l0_20, … and a record.")],
    train: Annotated[str, typer.Option(help="thresholds, decoder or all.")] = "thresholds",
    steps: Annotated[int, typer.Option(help="Training steps for each.")] = 300,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to fit on.")] = 2048,
    held_out: Annotated[int, typer.Option(help="Held-out sequences to judge on.")] = 256,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the order of the tokens.")] = 0,
) -> None:
    """Refit a trained SAE's thresholds to several L0s, each saved and judged."""
    import torch

    from jumprelu_plugin.finetune import l0_sweep as sweeps
    from jumprelu_plugin.finetune.refit import RefitSettings
    from jumprelu_plugin.models.text import tokenized_dataset

    targets = sweeps.numbers(l0)
    settings = RefitSettings(train, steps, batch_tokens, lr, seed)
    dictionary, language_model = _load(sae, model)
    tokenizer, hook = language_model.tokenizer, dictionary.cfg.metadata.hook_name
    text = tokenized_dataset(tokenizer, context_size, "train").shuffle(seed)
    to_fit = torch.tensor(text[:sequences]["tokens"])
    to_judge = torch.tensor(
        tokenized_dataset(tokenizer, context_size, "test").shuffle(seed)[:held_out]["tokens"]
    )
    special = tokenizer.all_special_ids
    found = sweeps.run_l0_sweep(
        sae,
        targets,
        output,
        rows=sweeps.harvest(language_model, hook, to_fit, special_token_ids=special, seed=seed),
        held_out=sweeps.harvest(language_model, hook, to_judge, special_token_ids=special),
        settings=settings,
        model=language_model,
        tokens=to_judge,
        log=console.print,
    )
    console.print(sweeps.table(found))
    console.print(f"written: {output}", highlight=False)


@app.command()
def train_transcoders(
    model: Annotated[str, typer.Option(help="tiny-gemma-2, a folder, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder for layer_0, layer_1, … and a record.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 1_000_000,
    target_l0: Annotated[float | None, typer.Option(help="Active latents a token; 24.")] = None,
    l0_coefficient: Annotated[float | None, typer.Option(help="A fixed penalty instead.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents of each; 8 times d_in.")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="With a linear skip connection.")] = False,
    layers: Annotated[str | None, typer.Option(help="Such as 0-5 or 1,3; all.")] = None,
    hook_in: Annotated[
        str, typer.Option(help="Input hook.")
    ] = "blocks.{layer}.ln2.hook_normalized",
    hook_out: Annotated[str, typer.Option(help="Output hook.")] = "blocks.{layer}.hook_mlp_out",
    dataset: Annotated[str, typer.Option(help="Text; the demo extra's by default.")] = "",
    recipe: Annotated[str, typer.Option(help="A recipe for transcoders.")] = "transcoder",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the recipe's.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens a step; the recipe's.")] = None,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    chunk_sequences: Annotated[int, typer.Option(help="Sequences shuffled together.")] = 1024,
    memory_gb: Annotated[float | None, typer.Option(help="Keep to this much memory.")] = None,
    checkpoints: Annotated[int, typer.Option(help="Saved along the way.")] = 10,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train one transcoder a layer in a single pass over the text.

    Interrupted, the same command goes on where it stood.
    """
    from sae_lens.training._interruption import InterruptedException

    from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings
    from jumprelu_plugin.transcoders.per_layer.run import train_transcoders as run

    settings = TranscoderSettings(
        model_name=model,
        dataset_path=dataset,
        hook_in=hook_in,
        hook_out=hook_out,
        layers=None if layers is None else _layer_numbers(layers),
        d_sae=d_sae,
        target_l0=target_l0,
        l0_coefficient=l0_coefficient,
        skip=skip,
        recipe=recipe,
        training_tokens=tokens,
        lr=lr,
        batch_tokens=batch_tokens,
        context_size=context_size,
        chunk_sequences=chunk_sequences,
        memory_gb=memory_gb,
        checkpoints=checkpoints,
        seed=seed,
        device=device,
    )
    try:
        written = run(output, settings, log=console.print)
    except InterruptedException:
        console.print("interrupted; the same command goes on from the last step")
        raise typer.Exit(130) from None
    console.print(f"written: {written}")


@app.command()
def train_clt(
    model: Annotated[str, typer.Option(help="tiny-gemma-2, a folder, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder for the transcoder and a record.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 1_000_000,
    target_l0: Annotated[float | None, typer.Option(help="Active latents a layer; 24.")] = None,
    l0_coefficient: Annotated[float | None, typer.Option(help="A fixed penalty instead.")] = None,
    l0_warm_up_steps: Annotated[int, typer.Option(help="Of a fixed penalty.")] = 0,
    sparsity: Annotated[Penalty, typer.Option(help="The penalty.")] = Penalty.step,
    tanh_scale: Annotated[float, typer.Option(help="c in tanh(c f |d|).")] = 4.0,
    d_sae: Annotated[int | None, typer.Option(help="Latents of a layer; 8 times d_in.")] = None,
    layers: Annotated[str | None, typer.Option(help="Consecutive, such as 0-5; all.")] = None,
    hook_in: Annotated[
        str, typer.Option(help="Input hook.")
    ] = "blocks.{layer}.ln2.hook_normalized",
    hook_out: Annotated[str, typer.Option(help="Output hook.")] = "blocks.{layer}.hook_mlp_out",
    dataset: Annotated[str, typer.Option(help="Text; the demo extra's by default.")] = "",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 4e-3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    chunk_sequences: Annotated[int, typer.Option(help="Sequences shuffled together.")] = 1024,
    memory_gb: Annotated[float | None, typer.Option(help="Keep to this much memory.")] = None,
    checkpoints: Annotated[int, typer.Option(help="Saved along the way.")] = 10,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train a cross-layer transcoder: latents of each layer write to all later MLP outputs.

    Interrupted, the same command goes on where it stood.
    """
    from sae_lens.training._interruption import InterruptedException

    from jumprelu_plugin.transcoders.clt.run import CLTSettings, train_clt

    settings = CLTSettings(
        model_name=model,
        dataset_path=dataset,
        hook_in=hook_in,
        hook_out=hook_out,
        layers=None if layers is None else _layer_numbers(layers),
        d_sae=d_sae,
        target_l0=target_l0,
        l0_coefficient=l0_coefficient,
        l0_warm_up_steps=l0_warm_up_steps,
        sparsity=sparsity.value,
        tanh_scale=tanh_scale,
        training_tokens=tokens,
        lr=lr,
        batch_tokens=batch_tokens,
        context_size=context_size,
        chunk_sequences=chunk_sequences,
        memory_gb=memory_gb,
        checkpoints=checkpoints,
        seed=seed,
        device=device,
    )
    try:
        written = train_clt(output, settings, log=console.print)
    except InterruptedException:
        console.print("interrupted; the same command goes on from the last step")
        raise typer.Exit(130) from None
    console.print(f"written: {written}")


def _layer_numbers(text: str) -> tuple[int, ...]:
    """The layers that "0-5" or "1,3,5" names.

    Raises:
        ValueError: it is neither.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--layers is {text!r}; give numbers such as 0-5 or 1,3,5")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


@app.command()
def evaluate(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE or a cross-layer transcoder.")],
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences to read.")] = 128,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    output: Annotated[Path | None, typer.Option(help="JSON record to write.")] = None,
) -> None:
    """Delta LM loss, FVU, L0, dead and dense latents of a saved SAE.

    A cross-layer transcoder takes the place of all its MLPs at once.
    """
    import torch

    from jumprelu_plugin import evaluation
    from jumprelu_plugin.models.language_models import model_digest
    from jumprelu_plugin.models.text import tokenized_dataset
    from jumprelu_plugin.records import digest, provenance
    from jumprelu_plugin.transcoders import clt as cross_layer
    from jumprelu_plugin.transcoders.clt import folder

    judge: Any = evaluation.evaluate
    if folder.is_here(sae):
        judge = cross_layer.evaluate_clt
        dictionary = cross_layer.load_clt(sae)
        language_model = _model_of(sae, model or dictionary.cfg.model_name)
    else:
        dictionary, language_model = _load(sae, model)
    text = tokenized_dataset(language_model.tokenizer, context_size, "test")
    tokens = torch.tensor(text[:sequences]["tokens"])
    result = judge(language_model, dictionary, tokens)
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
    from jumprelu_plugin.analysis import steering
    from jumprelu_plugin.studies.demo import generate

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
def dashboard(
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens saves it.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("features.html"),
    model: Annotated[str | None, typer.Option(help="Model; the SAE's own by default.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences to read.")] = 256,
    context_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    examples: Annotated[int, typer.Option(help="Contexts shown of each latent.")] = 8,
    latent: Annotated[list[int] | None, typer.Option(help="Only these latents.")] = None,
) -> None:
    """Write a searchable HTML page of a dictionary's latents; it needs no network."""
    import torch

    from jumprelu_plugin.analysis.dashboard import write_dashboard
    from jumprelu_plugin.models.text import tokenized_dataset

    dictionary, language_model = _load(sae, model)
    text = tokenized_dataset(language_model.tokenizer, context_size, "test")
    tokens = torch.tensor(text[:sequences]["tokens"])
    path = write_dashboard(
        output, language_model, dictionary, tokens, latents=latent, examples=examples
    )
    console.print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)", highlight=False)


@app.command()
def export(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A saved dictionary; for circuit-tracer a folder of layer_0, ..."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="Target; see --list.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    list_targets: Annotated[bool, typer.Option("--list", help="What each target takes.")] = False,
    unchecked: Annotated[
        bool, typer.Option(help="Do not read back with the target's loader (not installed).")
    ] = False,
    latent: Annotated[list[int] | None, typer.Option(help="Steering: which latent(s).")] = None,
    amount: Annotated[list[float] | None, typer.Option(help="Steering: how much of each.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Model, where not recorded.")] = None,
    hook_name: Annotated[str | None, typer.Option(help="Hook it reads, if not recorded.")] = None,
    hook_name_out: Annotated[str | None, typer.Option(help="Hook a transcoder writes.")] = None,
    fold_scale: Annotated[bool, typer.Option(help="Fold a checkpoint's input scale.")] = False,
    fold_gain: Annotated[bool, typer.Option(help="Fold the norm's gain (gemma-scope-2).")] = False,
    n_layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    pad_missing: Annotated[bool, typer.Option(help="Dead transcoders for missing layers.")] = False,
    scan: Annotated[str | None, typer.Option(help="Name of the set, for circuit-tracer.")] = None,
) -> None:
    """Write a dictionary in another tool's format, read it back with that tool and compare."""
    from jumprelu_plugin import formats as exports

    if list_targets:
        console.print(exports.table())
        return
    if folder is None or to is None or output is None:
        raise ValueError("give FOLDER, --to TARGET and --output FOLDER, or --list")
    given = {
        "amounts": exports.amounts(latent, amount),
        "model_name": model_name,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "fold_scale": fold_scale,
        "fold_gain": fold_gain,
        "n_layers": n_layers,
        "pad_missing": pad_missing,
        "scan": scan,
    }
    check = exports.export(
        folder, to, output, unchecked=unchecked, **{k: v for k, v in given.items() if v}
    )
    console.print(f"written: {output} ({check or 'not read back'})", highlight=False)


@app.command()
def recipes() -> None:
    """List the training recipes and where their numbers come from."""
    from jumprelu_plugin.recipes import RECIPES

    for recipe in RECIPES.values():
        console.rule(f"[bold]{recipe.name}[/]", align="left")
        console.print(f"{recipe.about}\n[dim]{recipe.source}[/]\n")
        numbers = Table.grid(padding=(0, 2))
        for name, value in recipe.numbers().items():
            numbers.add_row(f"  {name}", value)
        console.print(numbers, "")


def _load(sae_folder: Path, model_name: str | None) -> tuple[Any, Any]:
    """A saved SAE and the model it belongs to.

    Raises:
        ValueError: the folder holds no SAE, or the SAE does not say its model.
    """
    from sae_lens import SAE

    if not Path(sae_folder, "cfg.json").is_file():
        raise ValueError(f"{sae_folder} holds no SAE: there is no cfg.json in it")
    sae = SAE.load_from_disk(sae_folder)
    return sae, _model_of(sae_folder, model_name or sae.cfg.metadata.model_name)


def _model_of(folder: Path, name: str | None) -> Any:
    """The model a dictionary belongs to. Raises ValueError where it is not known."""
    from jumprelu_plugin.models.language_models import load_model

    if not name:
        raise ValueError(f"the SAE in {folder} does not say its model; give --model")
    return load_model(name, "HookedSAETransformer")


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
