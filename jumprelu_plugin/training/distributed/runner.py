"""`jumprelu train` on the processes that torchrun started: latents sharded, batches split.

Every process loads the model and reads the same text, runs the model on its share of it, and gets
the others' activations (`harvest.py`). So all have the same batches; each trains its share of the
latents on its share of the tokens. What is saved is what one process saves.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.training.activations.scaler import pair_scaler
from jumprelu_plugin.training.distributed.division import Division
from jumprelu_plugin.training.distributed.gathering import gather_whole
from jumprelu_plugin.training.distributed.harvest import SharedHarvest
from jumprelu_plugin.training.distributed.launch import Launch, joined, without_sigterm
from jumprelu_plugin.training.distributed.sharded_sae import ShardOfSAE, shard_of
from jumprelu_plugin.training.distributed.shares import (
    config_of_share,
    pass_findings,
    refuse_pretrained,
    require_even_batch,
)
from jumprelu_plugin.training.distributed.trainer import AgreedCheckpoints, ShardTrainer
from jumprelu_plugin.training.health.preflight import Preflight, run_preflight
from jumprelu_plugin.training.resuming import resolve_auto
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner

# What may differ between the processes of one run, or is made to agree.
_OWN_FIELDS = ("checkpoint_path", "device", "llm_device", "act_store_device", "logger")
_PLAIN = bool | float | str
# Rows of the text whose digests are compared before the run.
_COMPARED_ROWS = 16


class ShardedTrainingRunner(JumpReLUTrainingRunner):
    """Trains one dictionary on the processes of a run.

    Args:
        launch: these processes; inside `launch.joined`.
        cfg, options: as for `JumpReLUTrainingRunner`, and the same on every process.

    Raises:
        ValueError: as there; the latents or a batch cannot be dealt evenly, or the processes have
            different configs, texts or activations. On the first process; SystemExit on the others.

    Attributes:
        harvest: how activations are drawn together; None where each process draws them all.
    """

    harvest: SharedHarvest | None = None

    def __init__(self, launch: Launch, cfg: Any, **options: Any):
        self.launch = launch
        plain = {name: value for name, value in options.items() if isinstance(value, _PLAIN)}
        launch.agree_on("set of options", repr(sorted(plain.items())))
        cfg = self._own_config(cfg)
        for name in ("override_sae", "activations"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is not taken on many processes: leave it out")
        refuse_pretrained(cfg)
        require_even_batch(cfg, launch.mesh.data_parallel_size)
        torch.manual_seed(cfg.seed)
        shard = launch.agree(lambda: shard_of(cfg.sae, launch.mesh))
        drawn = torch.get_rng_state()
        launch.agree(
            lambda: super(ShardedTrainingRunner, self).__init__(cfg, override_sae=shard, **options)
        )
        torch.set_rng_state(drawn)  # as after the draws of one process's dictionary
        launch.agree_on("text", digest_of_text(self.activations_store.dataset))
        # A thread that draws in advance could not say when the others are to.
        if not cfg.prefetch_llm_batches:
            self.harvest = SharedHarvest(launch)
            self.harvest.share(self.activations_store)

    def _own_config(self, cfg: Any) -> Any:
        """The config with this process's GPU, and with the first's folder of checkpoints."""
        own = {name: value for name, value in cfg.to_dict().items() if name not in _OWN_FIELDS}
        self.launch.agree_on("config", json.dumps(own, sort_keys=True, default=str))
        # What `auto` finds is the first's to say: one that found another would wait forever.
        # The two fields alone: the command line's config is of a class that cannot be pickled.
        found = self.launch.from_the_first(lambda: _checkpoints_of(resolve_auto(cfg)))
        cfg = copy.copy(cfg)
        cfg.checkpoint_path, cfg.resume_from_checkpoint = found
        if self.launch.rank:
            cfg.logger = dataclasses.replace(cfg.logger, log_to_wandb=False)
        for field in ("device", "llm_device", "act_store_device"):
            setattr(cfg, field, self.launch.own(getattr(cfg, field)))
        return cfg

    @override
    def passes_ahead(self) -> int:
        # Only where asked for: processes that share a harvest wait for each other in every pass.
        return super().passes_ahead() if self.cfg.prefetch_llm_batches else 0

    @property
    def shard(self) -> ShardOfSAE:
        """What this process trains."""
        assert isinstance(self.sae, ShardOfSAE)
        return self.sae

    @override
    def preflight(self) -> Preflight:
        """As for one process, of this process's share of the latents as if they were a dictionary
        of their own, with their share of the target L0 and of a batch. The first process looks for
        all."""
        return self.launch.from_the_first(self._preflight)

    def _preflight(self) -> Preflight:
        shard, given = self.shard, self.shard.whole_cfg
        share = config_of_share(given, shard.processes.layout)
        kind = next(c for c in type(shard).__mro__ if not issubclass(c, ShardOfSAE))
        with torch.random.fork_rng():
            sae: Any = kind(share)
        sae.to(shard.device)
        scaler = pair_scaler(sae) if "transcoder" in given.architecture() else None
        mesh = self.launch.mesh
        division = Division(mesh.data_parallel_size, mesh.model_parallel_size)
        found = run_preflight(
            self.cfg,
            sae,
            self.activations_store,
            scaler=scaler,
            repairs=self._repairs,
            division=division,
        )
        return found.with_findings(pass_findings(self.cfg, division.processes))

    @override
    def run(self) -> JumpReLUTrainingSAE | None:
        """Train; the whole dictionary on the first process, None on the others."""
        super().run()
        return gather_whole(self.shard)

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        trainer.evaluator = None  # SAELens' evaluator splices in a whole dictionary
        return super().run_trainer_with_interruption_handling(trainer)

    @override
    def load_weights(self, checkpoint: str) -> None:
        """Nothing: the trainer reads the whole on the host, one process after the other."""

    @override
    def make_trainer(self, **parts: Any) -> ShardTrainer:
        trainer = ShardTrainer(**parts)
        trainer.launch = self.launch
        return trainer

    @override
    def make_checkpoints(self, folder: str) -> AgreedCheckpoints:
        return AgreedCheckpoints(folder, self.checkpoint_every_n_minutes)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        own = self.trainer
        assert isinstance(own, ShardTrainer)
        whole = own.whole(with_optimizer=False)

        def save() -> None:
            assert whole is not None
            self.trainer = whole
            parent = super(ShardedTrainingRunner, self)
            parent.save_final_sae(whole.sae, output_path, whole.log_feature_sparsity)

        try:
            self.launch.from_the_first(save)
        finally:
            self.trainer = own


def _checkpoints_of(cfg: Any) -> tuple[str | None, str | None]:
    """Where a run saves its checkpoints, and which it resumes from."""
    return cfg.checkpoint_path, cfg.resume_from_checkpoint


def digest_of_text(dataset: Any) -> str:
    """Of a dataset's length, where it has one, and its first rows."""
    found = hashlib.sha256(str(len(dataset) if hasattr(dataset, "__len__") else "").encode())
    for row in islice(iter(dataset or ()), _COMPARED_ROWS):
        found.update(repr(row).encode())
    return found.hexdigest()


def train_sharded(
    cfg: Any, *, data_parallel_size: int = 1, model_parallel_size: int = 1, **options: Any
) -> None:
    """Train one dictionary on the processes that torchrun started.

    Args:
        cfg: SAELens' runner config, the same on every process.
        data_parallel_size: over how many replicas batches are split.
        model_parallel_size: over how many processes the latents of each are sharded. The product is
            the number of processes.
        options: of `JumpReLUTrainingRunner`.

    Raises:
        ValueError, OSError: on the first process, as `JumpReLUTrainingRunner` and
            `launch.joined` raise them; SystemExit on the others.
    """
    with joined(data_parallel_size, model_parallel_size, cfg.device) as launch:
        metrics = options.pop("metrics_path", None)
        if metrics is None and cfg.output_path is not None:
            metrics = Path(cfg.output_path, "metrics.jsonl")
        runner = ShardedTrainingRunner(launch, cfg, **options)
        runner.metrics_path = Path(metrics) if metrics and launch.rank == 0 else None
        with without_sigterm():
            runner.run()
