"""Every reader of files, with a small whole folder for it to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

from benchmarks.tables import read as read_records
from jumprelu_plugin.formats import circuit_tracer, dictionary_learning, gemma_scope, gemma_scope_2
from jumprelu_plugin.formats.circuit_tracer_folder import require_readable
from jumprelu_plugin.formats.dictionary import Dictionary
from jumprelu_plugin.formats.reading import load_dictionary
from jumprelu_plugin.formats.saelens import load_sae
from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.records import append_jsonl, write_json
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.saes.parameters import Parameters
from jumprelu_plugin.training.activations.cache.reader import ActivationCache
from jumprelu_plugin.training.activations.cache.writer import write_activation_cache
from jumprelu_plugin.training.activations.hook_pairs import HookPair
from jumprelu_plugin.training.activations.pairs import PairStore
from jumprelu_plugin.training.activations.store import ResumableActivationsStore
from jumprelu_plugin.training.checkpoints import Checkpoints, write_manifest
from jumprelu_plugin.training.starting_weights import refuse_wrong_checkpoint
from jumprelu_plugin.training.trainer import JumpReLUTrainer
from jumprelu_plugin.transcoders.clt.config import CLTConfig, CLTTrainingConfig
from jumprelu_plugin.transcoders.clt.folder import load_clt, save_clt
from jumprelu_plugin.transcoders.clt.model import CrossLayerTranscoder
from jumprelu_plugin.transcoders.clt.trainer import Schedule
from jumprelu_plugin.transcoders.clt.trainer import Trainer as CLTTrainer
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep
from jumprelu_plugin.transcoders.output_folder import claim_output_folder
from jumprelu_plugin.transcoders.settings import CLTSettings

D_IN, D_SAE, BATCH = 23, 41, 37
HOOK, HOOK_OUT = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
# Where a run that is read in `outputs` would have left its record.
RECORD = "record.json"


@dataclass(frozen=True)
class Reader:
    """A reader and its input.

    Attributes:
        write: a whole folder.
        read: raises what the user of a command would see.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def parameters() -> Parameters:
    random = torch.Generator().manual_seed(7)
    shapes = {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    tensors = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    return Parameters.named({**tensors, "threshold": torch.rand(D_SAE, generator=random)})


def dictionary() -> Dictionary:
    return Dictionary(parameters(), "blocks.2.hook_resid_post", None, EMBEDDED_MODEL)


# ---------------------------------------------------------------- finished dictionaries


def write_saelens(folder: Path) -> None:
    config = JumpReLUSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        metadata=SAEMetadata(hook_name=HOOK, model_name=EMBEDDED_MODEL, context_size=64),
    )
    sae = JumpReLUSAE(config)
    sae.load_state_dict(dict(parameters().tensors()))
    sae.save_model(folder)
    Path(folder, "activation_scaler.json").write_text(
        json.dumps({"scaling_factor": 0.37, "has_whitening": False})
    )


def read_saelens(folder: Path) -> None:
    load_dictionary(folder, fold_scale=True)
    ModelOptions().resolve(load_sae(folder).cfg.metadata.to_dict(), folder)


def write_circuit_tracer(folder: Path) -> None:
    layers = {
        layer: Dictionary(parameters(), hook(layer, HOOK), hook(layer, HOOK_OUT))
        for layer in range(3)
    }
    circuit_tracer.write(layers, folder, model_name=EMBEDDED_MODEL, scan="fuzz")


def hook(layer: int, name: str) -> str:
    """The hook of another layer."""
    return name.replace(".2.", f".{layer}.")


def write_clt(folder: Path) -> None:
    save_clt(small_clt(), folder)


def small_clt() -> CrossLayerTranscoder:
    torch.manual_seed(3)
    return CrossLayerTranscoder(CLTConfig(D_IN, D_IN, D_SAE, (0, 1, 2), model_name=EMBEDDED_MODEL))


# ---------------------------------------------------------------- checkpoints


def training_config() -> JumpReLUTrainingSAEConfig:
    return JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, target_l0=5.0)


def write_checkpoint(folder: Path) -> None:
    """One from the middle of a run: at its end the scale of the inputs is folded."""
    torch.manual_seed(5)
    sae_trainer(folder.parent / "checkpoints").fit()
    (saved,) = Path(folder.parent, "checkpoints").iterdir()
    folder.rmdir()
    saved.rename(folder)


def sae_trainer(checkpoints: Path | None = None) -> JumpReLUTrainer:
    """One that has made no step, on random rows."""

    def rows() -> Any:
        random = torch.Generator().manual_seed(2)
        while True:
            yield torch.randn(BATCH, D_IN, generator=random)

    cfg = SAETrainerConfig(
        n_checkpoints=0 if checkpoints is None else 1,
        checkpoint_path=None if checkpoints is None else str(checkpoints),
        save_final_checkpoint=False,
        total_training_samples=7 * BATCH,
        device="cpu",
        autocast=False,
        lr=1e-3,
        lr_end=1e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=2,
        adam_beta1=0.0,
        adam_beta2=0.999,
        lr_decay_steps=2,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=5,
        feature_sampling_window=11,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return JumpReLUTrainer(
        cfg=cfg, sae=JumpReLUTrainingSAE(training_config()), data_provider=rows()
    )


def sign(folder: Path) -> None:
    """A manifest of the damaged files, as whoever damages them on purpose would write it."""
    if all(path.is_file() or path.is_dir() for path in folder.rglob("*")):
        write_manifest(folder, replaceable=True)


def read_checkpoint(folder: Path) -> None:
    sign(folder)
    run = SimpleNamespace(resume_from_checkpoint=str(folder), sae=training_config())
    refuse_wrong_checkpoint(run)
    trainer = sae_trainer()
    trainer.sae.load_weights_from_checkpoint(folder)
    trainer.load_trainer_state(folder)


@cache
def language_model() -> Any:
    return load_model(EMBEDDED_MODEL)


def store(*, pairs: bool) -> Any:
    """A store of a small pretokenized text, of one hook or of a pair."""
    model = language_model()
    random = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, model.cfg.d_vocab, (19, 13), generator=random)
    options: dict[str, Any] = {
        "model": model,
        "dataset": Dataset.from_dict({"tokens": tokens.tolist()}),
        "streaming": False,
        "hook_name": HOOK,
        "hook_head_index": None,
        "context_size": 13,
        "d_in": model.cfg.d_model,
        "n_batches_in_buffer": 4,
        "total_training_tokens": 1000,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 11,
        "prepend_bos": False,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    plain = ResumableActivationsStore(**options)
    if not pairs:
        return plain
    widths = {HOOK: model.cfg.d_model, HOOK_OUT: model.cfg.d_model}
    return PairStore.like(plain, {"layer_2": HookPair(HOOK, HOOK_OUT)}, widths, seed=0)


def write_store(folder: Path, *, pairs: bool) -> None:
    made = store(pairs=pairs)
    if not pairs:
        next(made)
    made.save_to_checkpoint(folder)


@cache
def kept_store(pairs: bool) -> Any:
    return store(pairs=pairs)


def clt_trainer(folder: Path) -> CLTTrainer:
    return CLTTrainer(
        CLTTrainingStep(small_clt(), CLTTrainingConfig(target_l0=5.0)),
        Schedule(steps=7, lr=1e-3, decay_steps=2),
        kept_store(True),
        checkpoints=Checkpoints(folder),
        metrics_path=folder / "metrics.jsonl",
    )


def write_clt_checkpoint(folder: Path) -> None:
    trainer = clt_trainer(folder.parent / "clt_checkpoints")
    random = torch.Generator().manual_seed(6)
    for _ in range(2):
        for source in trainer.model.sources:
            for parameter in source.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random)
        trainer.optimizer.step()
        trainer.scheduler.step()
    for scaler in trainer.scalers:
        scaler.observe(torch.randn(BATCH, 2 * D_IN, generator=random))
        scaler.finish()
    folder.rmdir()
    saved = trainer.save()
    assert saved is not None
    saved.rename(folder)


def read_clt_checkpoint(folder: Path) -> None:
    sign(folder)
    clt_trainer(folder.parent).load(folder)


# ---------------------------------------------------------------- activations


def write_cache(folder: Path) -> None:
    tokens = torch.randint(5, 900, (7, 11), generator=torch.Generator().manual_seed(2))
    write_activation_cache(
        folder,
        load_model(EMBEDDED_MODEL),
        [HOOK],
        tokens,
        dtype="int8",
        sequences_per_shard=5,
        log=lambda _: None,
        model_name=EMBEDDED_MODEL,
        model_class_name="HookedTransformer",
    )


def read_cache(folder: Path) -> None:
    cache = ActivationCache(folder)
    cache.mean(HOOK)
    next(cache.batches(HOOK, 13))


# ---------------------------------------------------------------- records and settings


def write_lines(folder: Path) -> None:
    for step in range(23):
        metrics = {"step": step, "l0": 5.0, "fvu": 0.5 / (step + 1), "alarm": None}
        append_jsonl(folder / "metrics.jsonl", metrics)
    record = {"kind": "evaluation", "result": {"fvu": 0.5}, "provenance": {"git": None}}
    for _ in range(5):
        append_jsonl(folder / "records.jsonl", record)


def read_lines(folder: Path) -> None:
    read_records(folder / "metrics.jsonl")
    read_records(folder / "records.jsonl")


def write_output(folder: Path) -> None:
    write_json(folder / "unfinished.json", CLTSettings())
    for step in (3, 20):
        Path(folder, "checkpoints", str(step)).mkdir(parents=True)
    save_file({"x": torch.zeros(3)}, folder / "checkpoints" / "20" / "x.safetensors")


def read_output(folder: Path) -> None:
    claim_output_folder(folder, CLTSettings(), RECORD)


READERS = {
    "saelens": Reader(write_saelens, read_saelens),
    "gemma-scope": Reader(lambda folder: gemma_scope.write(dictionary(), folder), load_dictionary),
    "gemma-scope-2": Reader(
        lambda folder: gemma_scope_2.write(dictionary(), folder), load_dictionary
    ),
    "dictionary-learning": Reader(
        lambda folder: dictionary_learning.write(dictionary(), folder), load_dictionary
    ),
    "circuit-tracer": Reader(write_circuit_tracer, require_readable),
    "cross-layer": Reader(write_clt, load_clt),
    "checkpoint": Reader(write_checkpoint, read_checkpoint),
    "cross-layer-checkpoint": Reader(write_clt_checkpoint, read_clt_checkpoint),
    "activation-store": Reader(
        lambda folder: write_store(folder, pairs=False),
        lambda folder: kept_store(False).load_from_checkpoint(folder),
    ),
    "activation-cache": Reader(write_cache, read_cache),
    "unfinished-run": Reader(write_output, read_output),
    "records": Reader(write_lines, read_lines),
}
