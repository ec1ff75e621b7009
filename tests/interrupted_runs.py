"""Three small runs, each stopped halfway: the checkpoints that must keep loading.

`python -m tests.make_checkpoints` stopped them once and committed what they left, with what the
finished runs computed. `test_checkpoints.py` finishes them with today's code.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.training._interruption import InterruptedException
from torch import Tensor

from jumprelu_plugin import (
    CLTSettings,
    JumpReLUTrainingRunner,
    JumpReLUTrainingSAEConfig,
    TranscoderSettings,
    load_clt,
    train_clt,
    train_transcoders,
)
from tests.tiny import (
    D_MODEL,
    N_LAYERS,
    RESIDUAL,
    tiny_hf,
    tiny_hooked,
    tiny_tokenizer,
    tiny_tokens,
)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
CONTEXT, BATCH, STEPS, D_SAE = 13, 41, 40, 59


def tiny_model() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_hooked(tiny_hf(), tiny_tokenizer(Path(folder)))


def text() -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(97, CONTEXT).tolist()})


def probe() -> Tensor:
    return torch.randn(67, D_MODEL, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------- one function a kind of run


def run_sae(folder: Path, model: Any) -> None:
    """An SAE with everything a control holds: log θ, a density limit, resampling."""
    sae = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        target_l0=5,
        max_latent_density=0.25,
        hyperparameter_units="unit_rms",
        log_threshold=True,
        step_kernel="sparse",
    )
    checkpoints = sorted((folder / "checkpoints").glob("[0-9]*"))
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny",
        hook_name=RESIDUAL,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        context_size=CONTEXT,
        store_batch_size_prompts=5,
        n_batches_in_buffer=13,
        n_batches_for_norm_estimate=3,
        lr=3e-3,
        lr_decay_steps=10,
        dead_feature_window=20,
        checkpoint_path=None,
        output_path=str(folder / "output"),
        resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    cfg.checkpoint_path = str(folder / "checkpoints")  # the constructor adds a random folder
    JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model).run()


def run_transcoders(folder: Path, model: Any) -> None:
    settings = TranscoderSettings(**_LAYER_RUN, skip=True)
    train_transcoders(folder, settings, model=model, dataset=text(), log=lambda line: None)


def run_clt(folder: Path, model: Any) -> None:
    settings = CLTSettings(**_LAYER_RUN, step_kernel="sparse")
    train_clt(folder, settings, model=model, dataset=text(), log=lambda line: None)


_LAYER_RUN: dict[str, Any] = {
    "model_name": "tiny",
    "d_sae": D_SAE,
    "target_l0": 5.0,
    "training_tokens": STEPS * BATCH,
    "train_batch_size_tokens": BATCH,
    "context_size": CONTEXT,
    "store_batch_size_prompts": 5,
    "n_batches_in_buffer": 13,
    "n_batches_for_norm_estimate": 3,
    "n_checkpoints": 0,
    "lr": 3e-3,
    "evaluation_sequences": 0,
}


def sae_outputs(folder: Path) -> dict[str, Tensor]:
    sae = SAE.load_from_disk(folder / "output")
    return {"output": sae(probe())}


def transcoder_outputs(folder: Path) -> dict[str, Tensor]:
    return {
        f"layer_{layer}": SAE.load_from_disk(folder / f"layer_{layer}")(probe())
        for layer in range(N_LAYERS)
    }


def clt_outputs(folder: Path) -> dict[str, Tensor]:
    return {"output": load_clt(folder)(probe().expand(N_LAYERS, -1, -1))}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        run: starts it in a folder, or goes on with what is there.
        outputs: what its finished folder computes on `probe`.
    """

    run: Callable[[Path, Any], None]
    outputs: Callable[[Path], dict[str, Tensor]]


KINDS = {
    "sae": Kind(run_sae, sae_outputs),
    "transcoders": Kind(run_transcoders, transcoder_outputs),
    "clt": Kind(run_clt, clt_outputs),
}


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Send SIGINT, as Ctrl-C does, in the optimizer's step of this number."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made == steps:
            signal.raise_signal(signal.SIGINT)

    from torch.optim.optimizer import register_optimizer_step_post_hook

    hook = register_optimizer_step_post_hook(count)
    try:
        with suppress(InterruptedException):
            yield
    finally:
        hook.remove()


def stop_halfway(kind: Kind, folder: Path, model: Any) -> None:
    """Leave in `folder` what a run leaves that is interrupted after half its steps."""
    optimizers = N_LAYERS if kind is KINDS["transcoders"] else 1
    with interrupted_after(optimizers * STEPS // 2):
        kind.run(folder, model)
    shutil.rmtree(folder / "output", ignore_errors=True)
    for leftover in folder.glob("*.jsonl"):
        leftover.unlink()
