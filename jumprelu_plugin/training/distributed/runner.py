"""`jumprelu train` on the processes that torchrun started, with the latents sharded over them.

Every process loads the model and reads the same text, so that all see the same activations; each
trains its share of the latents. What is saved is what one process saves.
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
from jumprelu_plugin.training.distributed.gathering import gather_whole
from jumprelu_plugin.training.distributed.launch import Launch, joined, without_sigterm
from jumprelu_plugin.training.distributed.sharded_sae import ShardOfSAE, shard_of
from jumprelu_plugin.training.distributed.trainer import AgreedCheckpoints, ShardTrainer
from jumprelu_plugin.training.health.preflight import Preflight, run_preflight
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner

# What may differ between the processes of one run, or is made to agree.
_OWN_FIELDS = ("checkpoint_path", "device", "llm_device", "act_store_device", "logger")
# Rows of the text whose digests are compared before the run.
_COMPARED_ROWS = 16


class ShardedTrainingRunner(JumpReLUTrainingRunner):
    """Trains one dictionary whose latents are sharded over the processes of a run.

    Args:
        launch: these processes; inside `launch.joined`.
        cfg, options: as for `JumpReLUTrainingRunner`, and the same on every process.

    Raises:
        ValueError: as there; the latents cannot be dealt evenly, or the processes have different
            configs, texts or activations. On the first process; SystemExit on the others.
    """

    def __init__(self, launch: Launch, cfg: Any, **options: Any):
        self.launch = launch
        cfg = self._own_config(cfg)
        for name in ("override_sae", "activations"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is not taken where latents are sharded: leave it out")
        if cfg.from_pretrained_path is not None:
            raise ValueError(
                "from_pretrained_path is not taken where latents are sharded: give "
                "resume_from_checkpoint, or model_parallel_size=1"
            )
        torch.manual_seed(cfg.seed)
        shard = launch.agree(lambda: shard_of(cfg.sae, launch.size))
        drawn = torch.get_rng_state()
        launch.agree(
            lambda: super(ShardedTrainingRunner, self).__init__(cfg, override_sae=shard, **options)
        )
        torch.set_rng_state(drawn)  # as after the draws of one process's dictionary
        launch.agree_on("text", self._digest_of_text())

    def _own_config(self, cfg: Any) -> Any:
        """The config with this process's GPU, and with the first's folder of checkpoints."""
        own = {name: value for name, value in cfg.to_dict().items() if name not in _OWN_FIELDS}
        self.launch.agree_on("config", json.dumps(own, sort_keys=True, default=str))
        cfg = copy.copy(cfg)
        cfg.checkpoint_path = self.launch.all_objects(cfg.checkpoint_path)[0]
        if self.launch.rank:
            cfg.logger = dataclasses.replace(cfg.logger, log_to_wandb=False)
        for field in ("device", "llm_device", "act_store_device"):
            if str(getattr(cfg, field)) == "cuda":
                setattr(cfg, field, f"cuda:{self.launch.local_rank}")
        return cfg

    def _digest_of_text(self) -> str:
        dataset: Any = self.activations_store.dataset
        found = hashlib.sha256(str(len(dataset) if hasattr(dataset, "__len__") else "").encode())
        for row in islice(iter(dataset or ()), _COMPARED_ROWS):
            found.update(repr(row).encode())
        return found.hexdigest()

    @property
    def shard(self) -> ShardOfSAE:
        """What this process trains."""
        assert isinstance(self.sae, ShardOfSAE)
        return self.sae

    @override
    def preflight(self) -> Preflight:
        """As for one process, of this process's share of the latents as if they were a dictionary
        of their own, with their share of the target L0. The first process looks for all."""
        return self.launch.from_the_first(self._preflight)

    def _preflight(self) -> Preflight:
        shard, layout = self.shard, self.shard.processes.layout
        given = shard.whole_cfg
        share = dataclasses.replace(
            given,
            d_sae=layout.held,
            target_l0=None if given.target_l0 is None else given.target_l0 / layout.shards,
            matryoshka_widths=list(layout.held_prefixes) if layout.prefixes else None,
            matryoshka_loss_weight=given.matryoshka_loss_weight if layout.prefixes else None,
        )
        kind = next(c for c in type(shard).__mro__ if not issubclass(c, ShardOfSAE))
        with torch.random.fork_rng():
            sae: Any = kind(share)
        sae.to(shard.device)
        scaler = pair_scaler(sae) if "transcoder" in given.architecture() else None
        return run_preflight(
            self.cfg, sae, self.activations_store, scaler=scaler, repairs=self._repairs
        )

    @override
    def run(self) -> JumpReLUTrainingSAE | None:
        """Train; the whole dictionary on the first process, None on the others."""
        # SAELens' runner would load the whole checkpoint on every device.
        self._resumed, self.cfg.resume_from_checkpoint = self.cfg.resume_from_checkpoint, None
        super().run()
        return gather_whole(self.shard)

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self.cfg.resume_from_checkpoint = self._resumed
        trainer.evaluator = None  # SAELens' evaluator splices in a whole dictionary
        if self._resumed is not None:
            self.activations_store.load_from_checkpoint(self._resumed)
        return super().run_trainer_with_interruption_handling(trainer)

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


def train_sharded(cfg: Any, model_parallel_size: int, **options: Any) -> None:
    """Train one dictionary on the processes that torchrun started, latents sharded over them.

    Args:
        cfg: SAELens' runner config, the same on every process.
        model_parallel_size: over how many processes; as many as were started.
        options: of `JumpReLUTrainingRunner`.

    Raises:
        ValueError, OSError: on the first process, as `JumpReLUTrainingRunner` and
            `launch.joined` raise them; SystemExit on the others.
    """
    with joined(model_parallel_size, cfg.device) as launch:
        metrics = options.pop("metrics_path", None)
        if metrics is None and cfg.output_path is not None:
            metrics = Path(cfg.output_path, "metrics.jsonl")
        runner = ShardedTrainingRunner(launch, cfg, **options)
        runner.metrics_path = Path(metrics) if metrics and launch.rank == 0 else None
        with without_sigterm():
            runner.run()
