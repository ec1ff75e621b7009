"""Training on many layers at once: `jumprelu train-transcoders` and `train-clt`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from jumprelu_plugin.cli.console import console

app = typer.Typer()


class Penalty(str, Enum):
    """What sparsity costs."""

    step = "step"
    tanh = "tanh"


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
    written = run(output, settings, log=console.print)
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
    written = train_clt(output, settings, log=console.print)
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
