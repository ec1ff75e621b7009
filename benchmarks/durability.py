"""Kill training runs, damage their checkpoints, take their disk away, and compare what they end as.

    python -m benchmarks.durability            # 160 kills, 50 damages, 3 disks
    python -m benchmarks.durability --kills 10 --layer-kills 5 --damages 3

Every run is a small one of `jumprelu train`, `train-transcoders` or `train-clt`. It is killed with
SIGKILL, started again with the same command, and its final weights are compared, bit for bit, with
those of a run that was never interrupted and never saved a checkpoint by the clock. Half of the
kills come while a checkpoint is being written: its unfinished folder was seen, and is still there
afterwards. A record a trial; those that are in the file are kept.

The children are forked from one process that has imported everything (`durability_runs`), and a few
kills are done on fresh processes. Needs Linux; the disks need the right to mount a tmpfs.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch loads: a process with threads cannot fork
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")

import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from benchmarks.durability_runs import (
    CHECKPOINTS,
    KINDS,
    OFTEN,
    POLL,
    Child,
    command,
    forked,
    fresh,
    model,
    text,
    write_sources,
)
from benchmarks.quality import RecordFile
from benchmarks.tables import RESULTS
from jumprelu_plugin.records import provenance
from jumprelu_plugin.training.checkpoints import damage

# A write takes milliseconds on a fast machine, and one kill in ten comes in the middle of one.
ATTEMPTS = 200
COST_SHAPE = (576, 8192)
MEMORY = Path("/dev/shm")  # a kill needs no disk, and a disk is slow


class Trials:
    """Trials of one kind of run against its uninterrupted one, made at the first trial.

    Args:
        folder: for the runs' files.
        sources: the model and text of a run that is typed into a new Python; None to fork.
    """

    def __init__(self, name: str, folder: Path, sources: Path | None = None):
        self.name, self.kind, self.folder, self.sources = name, KINDS[name], folder, sources
        self.trials = 0
        self._whole: dict[str, torch.Tensor] | None = None
        self.seconds = 1.0  # of training, without what comes before

    def whole(self) -> dict[str, torch.Tensor]:
        """The weights of the uninterrupted run."""
        if self._whole is None:
            place = self.place()
            child = self.begin(place, checkpoints=0, minutes=0.0)
            child.wait_until(lambda: _training(place))
            began = time.monotonic()
            if child.wait() != 0 or not self.kind.is_finished(place):
                raise RuntimeError(f"the uninterrupted run failed: {child.said()[-2000:]}")
            self.seconds = time.monotonic() - began
            self._whole = self.kind.result(place)
            shutil.rmtree(place)
        return self._whole

    def place(self) -> Path:
        self.trials += 1
        place = self.folder / f"{self.name}-{self.trials}"
        place.mkdir(parents=True)
        return place

    def begin(self, place: Path, checkpoints: int = CHECKPOINTS, minutes: float = OFTEN) -> Child:
        log = self.folder / f"{place.name}.log"
        if self.sources is not None:
            return fresh(command(self.sources, place, checkpoints, minutes), log)
        return forked(lambda: self.kind.run(place, checkpoints, minutes), log)

    def finish(self, place: Path) -> dict[str, Any]:
        """Start again until the run is finished, and compare it."""
        child = None
        if not self.kind.is_finished(place):
            child = self.begin(place)
            if child.wait() != 0:
                return {"equal": False, "exit_code": child.code, "said": child.said()}
        found, whole = self.kind.result(place), self.whole()
        equal = found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)
        return {"equal": equal, "said": "" if child is None else child.said()}

    # ---------------------------------------------------------------- kills

    def kill(self, moment: str, draw: random.Random) -> dict[str, Any]:
        """Kill a run at a random moment of its training, or of the writing of a checkpoint."""
        self.whole()
        for _ in range(ATTEMPTS):
            place = self.place()
            child = self.begin(place)
            if moment == "random":
                child.wait_until(lambda at=place: _training(at))
                time.sleep(draw.uniform(0, self.seconds))
            else:
                self._wait_for_writing(child, place, draw)
            child.kill()
            unfinished = self.kind.unfinished(place)
            # A run that ended before it could be killed, or outside of a write, says nothing.
            if child.code == -9 and (moment == "random" or unfinished):
                break
            shutil.rmtree(place)
        else:
            raise RuntimeError(f"{self.name} could not be killed in {ATTEMPTS} attempts")
        saved = self.kind.saved(place)
        ended = self.finish(place)
        said = ended.pop("said")
        shutil.rmtree(place)
        return {
            **ended,
            "checkpoints": [path.name for path in saved],
            "unfinished": len(unfinished),
            "resumed": "resuming from" in said,
            **({} if ended["equal"] else {"log": said[-2000:]}),
        }

    def _wait_for_writing(self, child: Child, place: Path, draw: random.Random) -> None:
        for _ in range(draw.randint(0, 5)):
            child.wait_until(lambda: bool(self.kind.unfinished(place)))
            child.wait_until(lambda: not self.kind.unfinished(place))
        child.wait_until(lambda: bool(self.kind.unfinished(place)))
        time.sleep(draw.uniform(0, 30) * POLL)

    # ---------------------------------------------------------------- damage

    def damage(self, draw: random.Random) -> dict[str, Any]:
        """Kill a run, truncate a file of its newest checkpoint or flip a bit in it, and resume."""
        self.whole()
        place = self.place()
        child = self.begin(place)
        child.wait_until(lambda: len(self.kind.saved(place)) >= 2)
        time.sleep(draw.uniform(0, self.seconds))
        child.kill()
        saved = self.kind.saved(place)
        if len(saved) < 2 or self.kind.is_finished(place):
            return self.damage(draw)
        file = draw.choice(sorted(path for path in saved[-1].rglob("*") if path.is_file()))
        content = file.read_bytes()
        how = draw.choice(("truncated", "bit flipped"))
        if how == "truncated":
            file.write_bytes(content[: draw.randrange(len(content))])
        else:
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
        ended = self.finish(place)
        said = ended.pop("said")
        shutil.rmtree(place)
        return {
            **ended,
            "file": file.name,
            "how": how,
            "found": "is damaged" in said,
            "used_the_one_before": f"resuming from {saved[-2]}" in said.replace("\n", ""),
        }

    # ---------------------------------------------------------------- disks

    def disk(self, what: str) -> dict[str, Any]:
        """Take the disk away in the middle of a run: it fills, turns read-only or vanishes."""
        self.whole()
        place = self.place()
        with _tmpfs(place):
            child = self.begin(place)
            child.wait_until(lambda: len(self.kind.saved(place)) >= 2)
            if what == "full":
                _fill(place)
            elif what == "read-only":
                _remount(place, "ro")
            else:
                for path in place.iterdir():
                    shutil.rmtree(path, ignore_errors=True)
            code, said = child.wait(), child.said()
            finished = self.kind.is_finished(place)
            _remount(place, "rw")
            (place / "ballast").unlink(missing_ok=True)
            whole = all(damage(path) is None for path in self.kind.saved(place))
            ended = self.finish(place)
            again = ended.pop("said")
        shutil.rmtree(place)
        return {
            **ended,
            "exit_code": code,
            "finished_at_first": finished,
            "traceback": "Traceback" in said,
            "warned": "could not be saved" in said or " is gone" in said,
            "kept_checkpoints_whole": whole,
            "resumed": "resuming from" in again,
        }


def _training(place: Path) -> bool:
    return (place / "output" / "metrics.jsonl").exists() or any(place.glob("**/checkpoints/*"))


@contextmanager
def _tmpfs(place: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _remount(place: Path, mode: str) -> None:
    # Busy while a file is open for writing.
    for _ in range(2000):
        done = subprocess.run(
            ["mount", "-o", f"remount,{mode}", str(place)], capture_output=True, text=True
        )
        if done.returncode == 0:
            return
    raise RuntimeError(f"could not be made {mode}: {done.stderr}")


def _fill(place: Path) -> None:
    with (place / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(b"\0" * 4096):
                pass
        except OSError:
            return


# ---------------------------------------------------------------- cost


def cost() -> dict[str, Any]:
    """Seconds to write a checkpoint to this folder's disk, as a share of a minute."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from jumprelu_plugin.training.trainer import JumpReLUTrainer

    d_in, d_sae = COST_SHAPE
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, target_l0=40))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        cfg = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=folder, save_final_checkpoint=False,
            total_training_samples=2 * 512, device="cpu", autocast=False, lr=1e-3, lr_end=1e-4,
            lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
            lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=512,
            dead_feature_window=1000, feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        trainer = JumpReLUTrainer(cfg, sae, iter(lambda: torch.randn(512, d_in), None))
        # The mixing buffer, which is a checkpoint's other large part: 64 sequences of 256.
        rows = {"waiting": torch.randn(64 * 256 // 2, d_in), "serving": torch.randn(8192, d_in)}
        trainer.save_checkpoint_fn = lambda checkpoint_path: _save_rows(rows, checkpoint_path)
        for _ in range(2):
            trainer.step(torch.randn(512, d_in))
        seconds, processor = [], []
        for number in range(5):
            began = time.perf_counter(), time.process_time()
            trainer.save_checkpoint(str(number))
            seconds.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
        size = sum(p.stat().st_size for p in Path(folder, "4").rglob("*") if p.is_file())
    median = statistics.median(seconds)
    return {
        "d_in": d_in, "d_sae": d_sae, "bytes": size, "seconds": median,
        "slowest_seconds": max(seconds), "processor_seconds": statistics.median(processor),
        "load": os.getloadavg()[0], "share_at_one_a_minute": median / 60,
    }  # fmt: skip


def _save_rows(rows: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(rows, folder / "activations_store_state.safetensors")


def main(
    kills: Annotated[int, typer.Option(help="of jumprelu train.")] = 100,
    layer_kills: Annotated[int, typer.Option(help="of each of the others.")] = 30,
    fresh_kills: Annotated[int, typer.Option(help="of jumprelu train in new processes.")] = 5,
    damages: Annotated[int, typer.Option(help="of train; a third of it of the others.")] = 30,
    disks: Annotated[bool, typer.Option(help="on a small tmpfs.")] = True,
    output: Annotated[Path, typer.Option(help="records.")] = RESULTS / "durability.jsonl",
    seed: int = 0,
) -> None:
    """Make the trials that the file of records does not have."""
    records, origin = RecordFile(output), provenance(seed=seed)
    bad = 0

    def record(case: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        nonlocal bad
        began = time.monotonic()
        found = records.record(case, measure, origin)
        ended = "equal" if found.get("equal", True) else str(found)
        bad += ended != "equal"
        print(f"{time.monotonic() - began:6.1f} s  {list(case.values())}  {ended}", flush=True)

    torch.set_num_threads(1)
    # tqdm's own lock is shared with forked processes: one that is killed would keep it for ever.
    tqdm.set_lock(threading.RLock())
    model(), text()  # loaded before forking
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        place = Path(temporary)
        cases: list[tuple[float, dict[str, Any], Callable[[], dict[str, Any]]]] = []
        for name in KINDS:
            first, trials = name == "train", Trials(name, place / "runs")
            cases += _kills(trials, "forked", kills if first else layer_kills, seed)
            cases += _damages(trials, damages if first else damages // 3, seed)
            for what in ("full", "read-only", "vanished") if disks else ():
                case = {"test": "disk", "run": name, "what": what}
                cases.append((0.1, case, lambda w=what, t=trials: t.disk(w)))
        typed = Trials("train", place / "fresh", write_sources(place / "sources"))
        cases += [(0.2, {"test": "cost"}, cost), *_kills(typed, "fresh", fresh_kills, seed)]
        # All kinds advance together, so that a benchmark that is stopped has some of each.
        for _, case, measure in sorted(cases, key=lambda item: item[0]):
            record(case, measure)
    if bad:
        print(f"{bad} trials did not end as the uninterrupted run")
        raise typer.Exit(1)


def _kills(trials: Trials, process: str, count: int, seed: int) -> Iterator[Any]:
    for number in range(count):
        moment = ("random", "writing")[number % 2]
        case = {"test": "kill", "run": trials.name, "process": process, "moment": moment}
        draw = random.Random(f"{seed} {trials.name} {process} {number}")
        kill = partial(trials.kill, moment, draw)
        yield (number + 1) / count, {**case, "trial": number}, kill


def _damages(trials: Trials, count: int, seed: int) -> Iterator[Any]:
    for number in range(count):
        draw = random.Random(f"{seed} {trials.name} damage {number}")
        case = {"test": "damage", "run": trials.name, "trial": number}
        yield (number + 1) / count, case, partial(trials.damage, draw)


if __name__ == "__main__":
    typer.run(main)
