"""The layers of a set dealt over processes: each trains the transcoders of its own layers.

A layer's training needs nothing of another's, so the processes exchange activations alone. Each
runs the model on its share of the sequences, at the hooks of all layers, and hands every other
process the activations of its layers: none holds or receives more than its own. What is saved is
what one process saves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair, PairStore
from jumprelu_plugin.training.checkpoints import disk_errors
from jumprelu_plugin.training.distributed.agreed import AgreedBatches, CheckpointsByTheFirst
from jumprelu_plugin.training.distributed.division import share_of_pass
from jumprelu_plugin.training.distributed.launch import Launch
from jumprelu_plugin.training.health.alarms import Alarm
from jumprelu_plugin.training.text_source import without_false_alarms
from jumprelu_plugin.transcoders.per_layer.runner import LayerwiseRunner, LayerwiseTrainer


def dealt(names: Sequence[str], rank: int, size: int) -> list[str]:
    """The names of the transcoders that a process trains.

    Raises:
        ValueError: there are more processes than names.
    """
    if size > len(names):
        raise ValueError(
            f"{size} processes were started, and there are {len(names)} layers to train: start at "
            f"most one a layer (torchrun --nproc-per-node {len(names)})"
        )
    return list(names)[rank::size]


class DealtHarvest:
    """What the processes exchange while activations are drawn.

    Args:
        launch: these processes.
        source: a store of the hooks of all layers.
        hooks: of every process's layers, by rank.

    Attributes:
        sent: bytes of activations that this process handed to the others.
    """

    def __init__(self, launch: Launch, source: ActivationsStore, hooks: Sequence[Sequence[str]]):
        self._launch, self._source, self._hooks, self.sent = launch, source, hooks, 0

    def get_multi_hook_activations(
        self, tokens: Int[Tensor, "sequences positions"]
    ) -> dict[str, Tensor]:
        """The activations at this process's hooks, [sequences, positions, width] each; takes the
        place of the method of SAELens' store, on every process with the same tokens."""
        count, (rank, size) = len(tokens), (self._launch.rank, self._launch.size)
        share = share_of_pass(count, size)
        # The last shares may be shorter; then the last sequence fills them up.
        own = torch.arange(rank * share, (rank + 1) * share).clamp_max(count - 1)
        found = self._source.get_multi_hook_activations(tokens[own.to(tokens.device)])
        mine: dict[str, Tensor] = {}
        for owner, hooks in enumerate(self._hooks):
            for hook in hooks:
                whole = self._handed_over(found[hook].contiguous(), owner)
                if whole is not None:
                    mine[hook] = whole[:count]
        return mine

    def _handed_over(self, values: Tensor, owner: int) -> Tensor | None:
        parts = None
        if owner == self._launch.rank:
            parts = [torch.empty_like(values) for _ in range(self._launch.size)]
        else:
            self.sent += values.nbytes
        # NCCL exchanges what lies on GPUs alone.
        group = None if values.is_cuda else self._launch.objects
        dist.gather(values, parts, dst=owner, group=group)
        return None if parts is None else torch.cat(parts)


class DealtCheckpoints(CheckpointsByTheFirst):
    """Checkpoints of which every process writes a part; the first joins them.

    The processes of a run have to see one file system.
    """

    @override
    def save(
        self, name: str, write: Callable[[Path], Any], *, replaceable: bool = True
    ) -> Path | None:
        parts = [self.folder / f".{name}-part-{rank}" for rank in range(self.launch.size)]
        mine = parts[self.launch.rank]
        failed = ""
        try:
            with disk_errors():
                shutil.rmtree(mine, ignore_errors=True)
                mine.mkdir(parents=True)
                write(mine)
        except OSError as error:
            failed = str(error)
        failures = [text for text in self.launch.all_objects(failed) if text]

        def join(unfinished: Path) -> None:
            if failures:
                raise OSError(failures[0])
            _move(parts, unfinished)

        saved = super().save(name, join, replaceable=replaceable)
        shutil.rmtree(mine, ignore_errors=True)
        return saved


def _move(parts: Sequence[Path], into: Path) -> None:
    """Move what the first part holds, and the folders that the others hold."""
    for number, part in enumerate(parts):
        for path in sorted(part.iterdir()):
            if number == 0 or path.is_dir():
                path.replace(into / path.name)


class DealtTrainer(LayerwiseTrainer):
    """Trains this process's layers; the first process records the metrics and alarms of all."""

    launch: Launch

    @override
    def record(self, lines: dict[str, Any]) -> None:
        gathered = self.launch.all_objects(lines)
        if self.launch.rank == 0:
            super().record(_in_order(gathered))

    @override
    def report_all(self, found: list[tuple[str, Alarm]]) -> None:
        if self.launch.any_of(bool(found))[0]:
            gathered = self.launch.all_objects(found)
            if self.launch.rank == 0:
                super().report_all([each for part in gathered for each in part])


class DealtRunner(LayerwiseRunner):
    """Trains this process's layers of a set.

    Args:
        launch: these processes.
        cfg: of the whole set.
        pairs: of the whole set; this process trains those that `dealt` gives it.
        options: of `LayerwiseRunner`.

    Attributes:
        harvest: how activations are drawn together.
    """

    def __init__(self, launch: Launch, cfg: Any, pairs: Mapping[str, HookPair], **options: Any):
        self.launch, self._whole = launch, cfg.to_dict()
        by_rank = [dealt(list(pairs), rank, launch.size) for rank in range(launch.size)]
        mine = by_rank[launch.rank]
        torch.manual_seed(cfg.seed)
        saes = {name: made for name, made in _made_in_turn(cfg.saes) if name in mine}
        cfg.saes = {name: cfg.saes[name] for name in mine}
        for given in (cfg.hook_names_per_sae, cfg.hook_head_indices_per_sae):
            for name in set(given) - set(mine):
                del given[name]
        super().__init__(cfg, {name: pairs[name] for name in mine}, override_saes=saes, **options)
        widths = pair_widths(self.model, pairs.values())
        with without_false_alarms():
            source = PairStore.like(self.activations_store, pairs, widths, cfg.seed)
        hooks = [_hooks(pairs[name] for name in names) for names in by_rank]
        self.harvest = DealtHarvest(launch, source, hooks)
        store: Any = self.activations_store
        store.get_multi_hook_activations = self.harvest.get_multi_hook_activations

    @override
    def make_batches(self) -> AgreedBatches:
        batches = AgreedBatches(self.activations_store.get_multi_hook_data_loader())
        batches.launch = self.launch
        return batches

    @override
    def make_trainer(self, **parts: Any) -> DealtTrainer:
        trainer = DealtTrainer(**parts)
        trainer.launch = self.launch
        return trainer

    @override
    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is not None:
            (checkpoint_path / RUNNER_CFG_FILENAME).write_text(json.dumps(self._whole))


def _made_in_turn(configs: Mapping[str, Any]) -> Any:
    """The transcoders one after the other, each with the random numbers that one process gives it;
    those that nobody keeps are gone before the next is made."""
    for name, cfg in configs.items():
        kind, _ = get_sae_training_class(cfg.architecture())
        yield name, kind(cfg)


def _hooks(pairs: Any) -> list[str]:
    return list(dict.fromkeys(hook for pair in pairs for hook in (pair.hook_in, pair.hook_out)))


def _in_order(gathered: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What processes have by the names that `dealt` gave them, in the order before."""
    longest = max(map(len, gathered))
    rows = [list(part.items()) for part in gathered]
    return dict(row[place] for place in range(longest) for row in rows if place < len(row))
