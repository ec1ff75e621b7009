"""Trains the small Gemma 2 in `jumprelu_plugin/models/tiny_gemma_2`.

    python tools/train_tiny_gemma_2.py --work-folder WORK --steps 6000

Fetches five public texts (see tiny_gemma_2_text.py), trains a byte-level BPE tokenizer and the
model on their train split, keeps checkpoints in WORK, and writes the Hugging Face folder
WORK/tiny_gemma_2 and the loss table WORK/metrics.json. It needs the `demo` extra, torch,
transformers and, for WordNet, npm. The model card is written by hand from metrics.json.

With --minutes the learning rate depends on the time instead of the step count, so that the schedule
also ends on time on a shared machine. The record has the steps and tokens of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from kneser_ney import KneserNey, unigram_loss
from tiny_gemma_2_text import all_documents, fetch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from jumprelu_plugin.models.text import Document, token_stream, tokenized_dataset

VOCABULARY = 4096
CONTEXT = 256
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # Gemma's order
# Fraction of training rows from each corpus. Modern prose is 74 % of the rows and 67 % of the text.
MIX = {
    "wordnet": 0.32,
    "cia-world-factbook": 0.22,
    "django-docs": 0.20,
    "shakespeare": 0.14,
    "king-james-bible": 0.12,
}


def train_tokenizer(documents: list[Document], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and automatic BOS, saved in and loaded from `folder`."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents if d.split == "train"), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", SPECIAL.index("<bos>"))],
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"), pretty=False)
    # Not saved by transformers 5, which would name a class that transformers 4 does not have.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def new_model() -> Gemma2ForCausalLM:
    """A Gemma 2 of 5.2 million parameters, with all features of the architecture."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        max_position_embeddings=CONTEXT,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<eos>"),
        bos_token_id=SPECIAL.index("<bos>"),
        attn_implementation="eager",  # softcapping needs it  # pyright: ignore[reportCallIssue]
    )
    return Gemma2ForCausalLM(config)


def training_rows(
    streams: dict[str, np.ndarray], batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), both (batch, CONTEXT): BOS, then text from a random place."""
    random = np.random.default_rng(seed)
    names = list(MIX)
    while True:
        rows = np.empty((batch, CONTEXT + 1), dtype=np.int64)
        rows[:, 0] = SPECIAL.index("<bos>")
        for row, index in zip(
            rows, random.choice(len(names), batch, p=list(MIX.values())), strict=True
        ):
            stream = streams[names[index]]
            start = random.integers(len(stream) - CONTEXT)
            row[1:] = stream[start : start + CONTEXT]
        tokens = torch.from_numpy(rows)
        yield tokens[:, :-1], tokens[:, 1:]


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest."""
    hidden, plain = [], []
    for name, weight in model.named_parameters():
        (hidden if weight.ndim == 2 and "embed" not in name else plain).append(weight)
    decayed = [{"params": plain, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        decayed.append({"params": hidden, "weight_decay": args.weight_decay})
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(decayed, lr=args.lr, betas=(0.9, 0.95), fused=True)
    ]
    if args.optimizer == "muon":
        result.append(
            torch.optim.Muon(
                hidden,
                lr=args.muon_lr,
                weight_decay=args.weight_decay,
                adjust_lr_fn="match_rms_adamw",
                ns_steps=args.ns_steps,
            )
        )
    for optimizer in result:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return result


def schedule(progress: float, warm_up: float = 0.02, floor: float = 0.01) -> float:
    """Factor on the peak learning rate: linear warm-up, then a cosine down to `floor`."""
    if progress < warm_up:
        return max(progress / warm_up, 1e-3)
    turn = math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up)))
    return floor + (1 - floor) * (1 + turn) / 2


def train(
    model: Gemma2ForCausalLM, streams: dict[str, np.ndarray], args: argparse.Namespace
) -> dict:
    """Train in place; returns steps, tokens and seconds."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    rows = training_rows(streams, args.batch, args.seed)
    # Compile before the timing starts; these gradients are discarded.
    step_loss(*next(training_rows(streams, args.batch, args.seed + 1))).backward()
    model.zero_grad()
    optimizer_list = optimizers(model, args)
    average, saved, started, step = 0.0, time.monotonic(), time.monotonic(), 0
    while True:
        seconds = time.monotonic() - started
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if progress >= 1:
            break
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(progress)
        loss = step_loss(*next(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            optimizer.step()
        model.zero_grad()
        value = loss.item()
        step += 1
        average += (value - average) / min(step, 50)
        if step % 50 == 0:
            speed = step * args.batch * CONTEXT / (time.monotonic() - started)
            print(
                f"step {step} progress {progress:.3f} loss {average:.4f} {speed:.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - saved > 60 * args.checkpoint_minutes:
            torch.save(model.state_dict(), args.work_folder / "checkpoint.pt")
            saved = time.monotonic()
    seconds = time.monotonic() - started
    torch.save(model.state_dict(), args.work_folder / "checkpoint.pt")
    summary = {"steps": step, "tokens": step * args.batch * CONTEXT, "seconds": round(seconds)}
    (args.work_folder / "training.json").write_text(json.dumps(summary) + "\n")
    return summary


@torch.no_grad()
def held_out_loss(model: Gemma2ForCausalLM, rows: np.ndarray) -> float:
    """Mean nats per predicted token of rows (n, CONTEXT), in float32."""
    total = 0.0
    for start in range(0, len(rows), 16):
        batch = torch.from_numpy(rows[start : start + 16].astype(np.int64))
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def export(model: Gemma2ForCausalLM, folder: Path) -> str:
    """Write weights in the 16-bit type that changes the logits least; returns its name."""
    probe = torch.arange(4, 4 + 2 * 64).reshape(2, 64)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        exact = model(input_ids=probe, use_cache=False).logits
        errors = {}
        for dtype in (torch.bfloat16, torch.float16):
            model.load_state_dict({n: w.to(dtype).float() for n, w in weights.items()})
            logits = model(input_ids=probe, use_cache=False).logits
            errors[dtype] = (logits - exact).abs().max().item()
    best = min(errors, key=errors.__getitem__)
    print("largest logit error by type:", errors)
    model.load_state_dict(weights)
    model.to(best).save_pretrained(folder)
    model.float().load_state_dict({n: w.to(best).float() for n, w in weights.items()})
    return str(best).removeprefix("torch.")


def measure(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> dict:
    """Held-out nats per token of the model and of two n-gram baselines, for each corpus and all."""

    def rows(split: str, corpus: str) -> np.ndarray:
        chosen = [d for d in documents if d.corpus == corpus]
        data = tokenized_dataset(tokenizer, CONTEXT, split, chosen)  # pyright: ignore
        return np.asarray(data.with_format("numpy")["tokens"][:], dtype=np.int64)

    train_rows = np.concatenate([rows("train", corpus) for corpus in MIX])
    ngrams = KneserNey(train_rows, order=4, vocabulary=VOCABULARY)
    table = {}
    test_rows = {corpus: rows("test", corpus) for corpus in MIX}
    test_rows["all"] = np.concatenate(list(test_rows.values()))
    for corpus, held_out in test_rows.items():
        table[corpus] = {
            "tokens": int(held_out[:, 1:].size),
            "model": held_out_loss(model, held_out),
            "four_gram": ngrams.loss(held_out),
            "unigram": unigram_loss(train_rows, held_out, VOCABULARY),
        }
        print(corpus, table[corpus], flush=True)
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-folder", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--minutes", type=float)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--ns-steps", type=int, default=5)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--from-checkpoint", action="store_true", help="export without training")
    parser.add_argument("--no-measure", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    fetch(args.work_folder)
    documents = all_documents(args.work_folder)
    folder = args.work_folder / "tiny_gemma_2"
    if (folder / "tokenizer_config.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        tokenizer = train_tokenizer(documents, folder)
    model = new_model()
    record: dict = {
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "work_folder"},
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    if args.from_checkpoint:
        model.load_state_dict(torch.load(args.work_folder / "checkpoint.pt", weights_only=True))
    else:
        streams = {
            corpus: np.asarray(
                token_stream(
                    tokenizer,
                    [d for d in documents if d.corpus == corpus and d.split == "train"],
                ),
                dtype=np.int64,
            )
            for corpus in MIX
        }
        record["train_tokens"] = {corpus: len(stream) for corpus, stream in streams.items()}
        print(record, flush=True)
        record.update(train(model, streams, args))
    model.eval()
    record["dtype"] = export(model, folder)
    if not args.no_measure:
        record["held_out_nats_per_token"] = measure(model, tokenizer, documents)
        (args.work_folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
