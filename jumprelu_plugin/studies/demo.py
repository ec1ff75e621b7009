"""The whole workflow on the embedded Gemma 2: train, save, evaluate, look at latents, steer.

Every step calls what a user would call; this file puts the steps in order and prints. An
interrupted demo leaves nothing behind, and a new one replaces only an earlier demo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from torch import Tensor

from jumprelu_plugin.analysis.generation import generate
from jumprelu_plugin.analysis.steering import Add, steer
from jumprelu_plugin.analysis.top_activations import (
    TopActivations,
    clearest_latents,
    collect_top_activations,
)
from jumprelu_plugin.evaluation import Evaluation, evaluate
from jumprelu_plugin.formats.saelens import load_inference_sae
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model, model_digest
from jumprelu_plugin.models.text import corpus, documents_digest, tokenized_dataset
from jumprelu_plugin.models.token_text import TokenTexts
from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.records import provenance, read_json, whole_folder, write_json
from jumprelu_plugin.training.runner import METRICS_FILENAME, JumpReLUTrainingRunner, quiet

RECORD_FILENAME = "demo.json"
SAE_FOLDER = "sae"
STEERING_AMOUNT = 2.0  # times the strongest activation of the latent


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains. The defaults take about two minutes on two cores.

    Attributes:
        hook_name: the hook in the embedded model.
        d_sae: number of latents.
        target_l0: active latents a token.
        steps: training steps.
        train_batch_size_tokens: tokens in a step.
        context_size: tokens in a sequence.
        evaluation_sequences: held-out sequences for the evaluation and the examples.
        seed: of initialization, data order and sampled text.
    """

    hook_name: str = "blocks.3.hook_resid_post"
    d_sae: int = 2048
    target_l0: float = 32.0
    steps: int = 1000
    train_batch_size_tokens: int = 1024
    context_size: int = 128
    evaluation_sequences: int = 128
    seed: int = 0


@dataclass(frozen=True)
class SteeringEffect:
    """What adding one latent's decoder row does to the model's text.

    Attributes:
        latent: its number.
        amount: multiple of the decoder row that is added at every position.
        prompt: the text that the model continues.
        tokens: the tokens that most often follow where the latent fires, in held-out text.
        probability_before, probability_after: probability that one of `tokens` comes next after
            the prompt, without and with steering.
        text_before, text_after: sampled continuations, without and with steering.
    """

    latent: int
    amount: float
    prompt: str
    tokens: list[str]
    probability_before: float
    probability_after: float
    text_before: str
    text_after: str


def run_demo(output: str | Path, settings: DemoSettings, console: Console) -> Path:
    """Run the demo into `output` and return the folder of the trained SAE.

    Raises:
        ValueError: `output` holds something that is not an earlier demo.
    """
    output = Path(output)
    with whole_folder(output, replaces=_is_demo, kind="demo") as folder:
        _run(folder, settings, console)
    sae_folder = output / SAE_FOLDER
    _print_next_commands(console, sae_folder, output)
    return sae_folder


def _run(folder: Path, settings: DemoSettings, console: Console) -> None:
    torch.manual_seed(settings.seed)
    model = load_model(EMBEDDED_MODEL, "HookedSAETransformer")
    documents = corpus()
    train = tokenized_dataset(model.tokenizer, settings.context_size, "train", documents)
    test = tokenized_dataset(model.tokenizer, settings.context_size, "test", documents)
    tokens = settings.steps * settings.train_batch_size_tokens
    console.print(
        f"[bold]{EMBEDDED_MODEL}[/] · {settings.hook_name} · {settings.d_sae:,} latents · "
        f"target L0 {settings.target_l0:g} · {tokens:,} tokens"
    )
    _train(folder / SAE_FOLDER, model, train, settings)
    # The saved folder is what is evaluated, loaded by stock SAELens as any other tool would.
    sae = load_inference_sae(folder / SAE_FOLDER)
    held_out = torch.tensor(test[: settings.evaluation_sequences]["tokens"])
    result = evaluate(model, sae, held_out)
    console.print(result.table())
    special = list(model.tokenizer.all_special_ids)
    examples = collect_top_activations(model, sae, held_out, special_token_ids=special)
    latents = clearest_latents(examples, allowed=_whole_words(model))
    console.print(_latent_table(model, examples, latents))
    steered = _strongest(model, sae, examples, latents, settings.seed)
    if steered is not None:
        _show_steering(console, steered)
    _record(folder, model, documents, settings, result, latents, steered)


def _train(folder: Path, model: Any, dataset: Any, settings: DemoSettings) -> None:
    steps, batch = settings.steps, settings.train_batch_size_tokens
    sae = DEFAULT.sae_config(model.cfg.d_model, settings.d_sae, target_l0=settings.target_l0)
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=EMBEDDED_MODEL,
        hook_name=settings.hook_name,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        context_size=settings.context_size,
        store_batch_size_prompts=64,
        # A short demo fills no buffer that it will not train on.
        n_batches_in_buffer=min(512, max(64, steps * batch // settings.context_size)),
        n_batches_for_norm_estimate=20,
        exclude_special_tokens=True,
        lr=DEFAULT.learning_rate(sae, steps * batch, batch),
        lr_decay_steps=DEFAULT.lr_decay_steps(steps),
        dead_feature_window=max(1, steps // 5),
        seed=settings.seed,
        checkpoint_path=None,
        output_path=str(folder),
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with quiet():
        runner = JumpReLUTrainingRunner(
            cfg,
            override_dataset=dataset,
            override_model=model,
            metrics_path=folder.parent / METRICS_FILENAME,
        )
    runner.run()


def _latent_table(model: Any, examples: TopActivations, latents: list[int]) -> Table:
    table = Table(title="The ten clearest latents, on held-out text", show_lines=False)
    table.add_column("latent", justify="right")
    table.add_column("fires on", justify="right")
    table.add_column("strongest examples")
    for latent in latents:
        table.add_row(
            str(latent),
            f"{examples.latent_density[latent]:.2%}",
            Text("\n").join(_in_context(model, examples, latent, rank) for rank in (0, 2)),
        )
    return table


def _in_context(model: Any, examples: TopActivations, latent: int, rank: int) -> Text:
    ids, index = examples.context(latent, rank)
    texts, tokens = TokenTexts(model.tokenizer), ids.tolist()
    before, focus, after = (
        texts.join(part).replace("\n", "⏎")
        for part in (tokens[:index], [tokens[index]], tokens[index + 1 :])
    )
    text = Text(before, overflow="ellipsis", no_wrap=True)
    text.append(focus, style="bold reverse")
    text.append(after)
    return text


def _strongest(
    model: Any, sae: Any, examples: TopActivations, latents: list[int], seed: int
) -> SteeringEffect | None:
    """The latent with the clearest steering effect; None if `latents` is empty.

    Each latent is added at `STEERING_AMOUNT` times its strongest activation. The score is the log
    of the factor by which the latent's usual next tokens become more probable, times the squared
    share of distinct tokens in the sampled text: steering that makes the model repeat itself
    scores low.
    """
    prompt = "The government of the country"
    tokens = model.to_tokens(prompt)
    text_before = generate(model, prompt, seed)
    found: list[tuple[float, SteeringEffect]] = []
    texts = TokenTexts(model.tokenizer)
    for latent in latents:
        ids = examples.followers(latent)
        amount = STEERING_AMOUNT * float(examples.activation[latent, 0])
        before = _probability(model, tokens, ids)
        with steer(model, sae, Add(latent, amount)):
            after = _probability(model, tokens, ids)
        names = [texts.text(token) for token in ids.tolist()]
        effect = SteeringEffect(latent, amount, prompt, names, before, after, text_before, "")
        found.append((math.log(after / before), effect))
    best: tuple[float, SteeringEffect] | None = None
    # A text takes a second, and a share of at most 1 can only lower a score above 0.
    for factor, effect in sorted(found, key=lambda each: -each[0]):
        if best is not None and max(factor, 0) <= best[0]:
            break
        with steer(model, sae, Add(effect.latent, effect.amount)):
            text_after = generate(model, prompt, seed)
        score = factor * _variety(model, text_after) ** 2
        if best is None or score > best[0]:
            best = score, replace(effect, text_after=text_after)
    return None if best is None else best[1]


def _whole_words(model: Any) -> Bool[Tensor, " d_vocab"]:
    """Mask of the tokens that are a space and a word of four letters or more."""
    texts = TokenTexts(model.tokenizer)
    words = [texts.text(token) for token in range(model.cfg.d_vocab)]
    return torch.tensor([w[:1] == " " and w[1:].isalpha() and len(w) > 4 for w in words])


def _variety(model: Any, text: str) -> float:
    """Distinct tokens of a text as a share of all its tokens."""
    tokens = model.tokenizer(text)["input_ids"]
    return len(set(tokens)) / len(tokens)


@torch.no_grad()
def _probability(model: Any, tokens: Tensor, ids: Tensor) -> float:
    """Probability that the token after `tokens` is one of `ids`."""
    return float(model(tokens)[0, -1].softmax(-1)[ids].sum())


def _show_steering(console: Console, steered: SteeringEffect) -> None:
    tokens = " ".join(repr(token) for token in steered.tokens)
    table = Table(
        title=f"Steering with latent {steered.latent}: x += {steered.amount:.1f} · W_dec[latent]",
        caption=f"probability that the next token is one that often follows the latent: {tokens}",
        show_lines=True,
    )
    table.add_column("")
    table.add_column("text")
    table.add_column("probability", justify="right")
    table.add_row("without", Text(steered.text_before), f"{steered.probability_before:.2%}")
    table.add_row("with", Text(steered.text_after), f"{steered.probability_after:.2%}")
    console.print(table)


def _record(
    folder: Path,
    model: Any,
    documents: Any,
    settings: DemoSettings,
    result: Evaluation,
    latents: list[int],
    steered: SteeringEffect | None,
) -> None:
    write_json(
        folder / RECORD_FILENAME,
        {
            "kind": "demo",
            "settings": settings,
            "evaluation": result.to_dict(),
            "clearest_latents": latents,
            "steering": steered,
            "provenance": provenance(
                seed=settings.seed,
                model_digest=model_digest(model),
                data_digest=documents_digest(documents),
            ),
        },
    )


def _is_demo(folder: Path) -> bool:
    record = folder / RECORD_FILENAME
    return record.is_file() and read_json(record).get("kind") == "demo"


def _print_next_commands(console: Console, sae_folder: Path, output: Path) -> None:
    console.print(f"\nSaved: [bold]{sae_folder}[/] (a stock SAELens folder), {output}/demo.json")
    console.print("Next:")
    console.print(f"  jumprelu steer {sae_folder} --latent 7 --amount 20 --prompt 'The people'")
    console.print(f"  jumprelu evaluate {sae_folder}")
    console.print("  docs/getting-started.md: your own model, hook and text")
