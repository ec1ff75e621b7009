"""Transcoders of every layer, compared with the TopK transcoders of EleutherAI's sparsify.

    pip install --no-deps eai-sparsify natsort schedulefree
    python benchmarks/transcoders_vs_sparsify.py --output sparsify.json

Both have the same model, hooks, width, training tokens and batch size, and are evaluated on the
same held-out tokens. sparsify is trained first, with its unmodified Trainer and its defaults. Its k
is an upper bound of L0, because non-positive latents among the k are not active. The plugin's
target L0, on every layer, is the smallest L0 that sparsify has on any layer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn

from jumprelu_plugin.evaluation import StreamingMetrics, evaluate_transcoders
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model, model_digest
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.records import provenance, write_json
from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings, train_transcoders

CONTEXT = 128
SEQUENCES_A_STEP = 8  # 1,016 tokens besides BOS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("transcoders_vs_sparsify.json"))
    parser.add_argument("--sequences", type=int, default=3200, help="training text")
    parser.add_argument("--d_sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=24, help="of sparsify")
    parser.add_argument("--held_out", type=int, default=128, help="held-out sequences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_model(EMBEDDED_MODEL)
    special = sorted(get_special_token_ids(model.tokenizer))
    # Shuffled once, for both: sparsify reads in order.
    text = tokenized_dataset(model.tokenizer, CONTEXT, "train").shuffle(seed=args.seed)
    text = text.select(range(args.sequences))
    held_out = torch.tensor(
        tokenized_dataset(model.tokenizer, CONTEXT, "test")[: args.held_out]["tokens"]
    )
    pairs = [
        (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
        for layer in range(model.cfg.n_layers)
    ]

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        coders = train_sparsify(model, pairs, text, special, args, Path(folder, "sparsify"))
        sparsify_seconds = time.perf_counter() - started
        sparsify_layers = evaluate_layers(model, pairs, held_out, special, coders)
        target_l0 = min(layer["l0"] for layer in sparsify_layers)
        started = time.perf_counter()
        transcoders = train_plugin(model, text, target_l0, args, Path(folder, "plugin"))
        seconds = time.perf_counter() - started
        layers = evaluate_layers(
            model, pairs, held_out, special, [as_function(sae) for sae in transcoders]
        )
        spliced = evaluate_transcoders(model, transcoders, held_out)

    print("layer     plugin FVU, L0, dead       sparsify FVU, L0, dead")
    for layer, (a, b) in enumerate(zip(layers, sparsify_layers, strict=True)):
        print(f"{layer:>5}  {format_layer(a)}  {format_layer(b)}")
    delta = spliced.loss_spliced - spliced.loss_clean
    print(f"all spliced in: delta LM loss {delta:.3f} on a loss of {spliced.loss_clean:.3f}")
    print(f"seconds: {seconds:.0f} and {sparsify_seconds:.0f}")
    write_json(
        args.output,
        {
            "kind": "transcoders_vs_sparsify",
            "settings": {k: v for k, v in vars(args).items() if k != "output"},
            "target_l0": target_l0,
            "jumprelu-plugin": {"seconds": seconds, "layers": layers, "spliced": asdict(spliced)},
            "sparsify": {"seconds": sparsify_seconds, "layers": sparsify_layers},
            "provenance": provenance(seed=args.seed, model_digest=model_digest(model)),
        },
    )


def train_plugin(
    model: Any, text: Any, target_l0: float, args: argparse.Namespace, folder: Path
) -> list[Any]:
    batch = SEQUENCES_A_STEP * (CONTEXT - 1)
    settings = TranscoderSettings(
        d_sae=args.d_sae,
        target_l0=target_l0,
        training_tokens=args.sequences // SEQUENCES_A_STEP * batch,
        train_batch_size_tokens=batch,
        context_size=CONTEXT,
        n_batches_in_buffer=min(1024, args.sequences),
        evaluation_sequences=0,
        n_checkpoints=0,
        seed=args.seed,
    )
    train_transcoders(folder, settings, model=model, dataset=text)
    return [SAE.load_from_disk(folder / f"layer_{i}") for i in range(model.cfg.n_layers)]


def format_layer(layer: dict[str, float]) -> str:
    return f"{layer['fvu']:>12.4f} {layer['l0']:>6.2f} {layer['dead_share']:>6.1%}"


def as_function(sae: Any) -> Any:
    return lambda x: (sae(x), sae.encode(x))


# ---------------------------------------------------------------- sparsify


class Pair(nn.Module):
    """A module that takes x and gives y, as sparsify's trainer expects of an MLP."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Pairs(nn.Module):
    """What sparsify's trainer needs of a model: one `Pair` for each pair of hooks."""

    def __init__(self, model: Any, pairs: list[tuple[str, str]]):
        super().__init__()
        self.points = nn.ModuleList(Pair() for _ in pairs)
        self._harvested = [model]  # in a list: its weights are not this module's
        self._pairs = pairs
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> Pairs:
        return self

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> None:
        hooks = [hook for pair in self._pairs for hook in pair]
        cache = self._harvested[0].run_with_cache(input_ids, names_filter=hooks, prepend_bos=False)[
            1
        ]
        with torch.enable_grad():
            for point, (hook_in, hook_out) in zip(self.points, self._pairs, strict=True):
                point(cache[hook_in], cache[hook_out])


def train_sparsify(
    model: Any,
    pairs: list[tuple[str, str]],
    text: Any,
    special: list[int],
    args: argparse.Namespace,
    folder: Path,
) -> list[Any]:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    cfg = TrainConfig(
        SparseCoderConfig(num_latents=args.d_sae, k=args.k, transcode=True),
        batch_size=SEQUENCES_A_STEP,
        hookpoints=["points.*"],
        init_seeds=[args.seed],
        exclude_tokens=special,
        log_to_wandb=False,
        save_dir=str(folder),
        save_every=10**9,
    )
    rows = text.rename_column("tokens", "input_ids").with_format("torch")
    trainer = Trainer(cfg, rows, Pairs(model, pairs))  # type: ignore[arg-type]
    trainer.fit()
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()  # schedule-free: the averaged weights are the result

    def as_pair(coder: Any) -> Any:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            out = coder(x, x)
            acts = x.new_zeros(len(x), coder.num_latents)
            return out.sae_out, acts.scatter_(1, out.latent_indices, out.latent_acts)

        return call

    return [as_pair(trainer.saes[f"points.{layer}"]) for layer in range(len(pairs))]


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_layers(
    model: Any,
    pairs: list[tuple[str, str]],
    tokens: Tensor,
    special: list[int],
    transcoders: list[Any],
) -> list[dict[str, float]]:
    """Each layer's FVU, L0 and dead share on the tokens that are not special."""
    metrics = [StreamingMetrics() for _ in pairs]
    hooks = [hook for pair in pairs for hook in pair]
    for batch in tokens.split(8):
        cache = model.run_with_cache(batch, names_filter=hooks, prepend_bos=False)[1]
        kept = ~torch.isin(batch, torch.tensor(special))
        for (hook_in, hook_out), transcoder, layer_metrics in zip(
            pairs, transcoders, metrics, strict=True
        ):
            layer_metrics.update(cache[hook_out][kept], *transcoder(cache[hook_in][kept]))
    names = ("fvu", "l0", "dead_share")
    return [{name: asdict(m.compute())[name] for name in names} for m in metrics]


if __name__ == "__main__":
    main()
