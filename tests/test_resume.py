"""An interrupted run goes on where it stopped: real signals, whole checkpoints, equal weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from safetensors.torch import load_file
from tiny import BOS, D_MODEL, RESIDUAL, VOCABULARY, tiny_hf, tiny_hooked, tiny_tokenizer

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.cli.saelens_flags import parse_flags
from jumprelu_plugin.control.density import TENSOR_NAME
from jumprelu_plugin.saes.checkpoint import TENSORS_FILENAME
from jumprelu_plugin.training.activations.store import MixingBuffer, resumable
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from jumprelu_plugin.training.trainer import JumpReLUTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, CONTEXT, STEPS, D_SAE = 31, 13, 500, 41
ROWS = 67  # 804 rows of activations an epoch, 15,500 in a run: several times through the text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_hooked(tiny_hf(), tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def token_rows(rows: int = ROWS) -> Dataset:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, VOCABULARY, (rows, CONTEXT), generator=generator)
    tokens[:, 0] = BOS
    return Dataset.from_dict({"tokens": tokens.tolist()})


def config(folder: Path, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, target_l0=7, step_kernel="sparse")
    given = {
        "sae": sae,
        "model_name": "tiny",
        "hook_name": RESIDUAL,
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 17,
        "n_batches_in_buffer": 17,
        "n_batches_for_norm_estimate": 3,
        "exclude_special_tokens": True,
        "lr": 3e-3,
        "lr_decay_steps": 60,
        "dead_feature_window": 20,
        "feature_sampling_window": 23,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
        **fields,
    }
    return LanguageModelSAERunnerConfig(**given)


def run(model: Any, cfg: Any, dataset: Any = None, **options: Any) -> JumpReLUTrainingRunner:
    runner = JumpReLUTrainingRunner(cfg, override_dataset=dataset, override_model=model, **options)
    runner.run()
    return runner


def assert_same_sae(found: JumpReLUTrainingRunner, expected: JumpReLUTrainingRunner) -> None:
    for (name, value), (_, wanted) in zip(
        found.sae.state_dict().items(), expected.sae.state_dict().items(), strict=True
    ):
        assert torch.equal(value, wanted), name
    assert torch.equal(found.trainer.act_freq_scores, expected.trainer.act_freq_scores)
    assert found.sae.cfg.metadata.l0 == expected.sae.cfg.metadata.l0


def steps_logged(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "losses/overall_loss" in line]


# ---------------------------------------------------------------- the stream of activations


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.7, 1.0])
def test_the_buffer_gives_what_saelens_buffer_gives(fraction: float) -> None:
    def source() -> Any:
        generator = torch.Generator().manual_seed(3)
        for rows in [53, 7, 0, 101, 19, 211] * 9:
            yield torch.randn(rows, 3, generator=generator)

    torch.manual_seed(11)
    theirs = list(mixing_buffer(97, 13, source(), fraction))
    torch.manual_seed(11)
    ours = []
    with pytest.raises(StopIteration):  # theirs also empties the buffer; a model never ends
        buffer = MixingBuffer(97, 13, source(), fraction)
        while True:
            ours.append(next(buffer))
    assert len(ours) > 20
    for mine, wanted in zip(ours, theirs, strict=False):
        assert torch.equal(mine, wanted)


def test_the_store_gives_what_saelens_store_gives(model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    theirs = ActivationsStore.from_config(model, cfg, override_dataset=token_rows())
    ours = resumable(theirs, cfg)
    torch.manual_seed(5)
    batches = [next(theirs) for _ in range(70)]
    torch.manual_seed(5)
    assert all(torch.equal(next(ours), batch) for batch in batches)


@pytest.mark.parametrize(
    ("size", "fraction", "message"),
    [(12, 0.5, "holds 12 rows.*takes 13.*n_batches_in_buffer"), (50, 1.2, "1.2; expected 0 to 1")],
)
def test_a_buffer_that_cannot_work_is_refused(size: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixingBuffer(size, 13, iter(()), fraction)


# ---------------------------------------------------------------- checkpoints of a run


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "none"])
def test_a_run_resumed_from_any_checkpoint_is_the_run(
    model: Any, tmp_path: Path, normalisation: str
) -> None:
    sae = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        target_l0=3,
        step_kernel="sparse",
        log_threshold=True,
        max_latent_density=0.12,
        normalize_activations=normalisation,  # type: ignore[arg-type]
    )
    short = {"sae": sae, "training_tokens": 90 * BATCH}
    cfg = config(tmp_path, n_checkpoints=4, **short)
    whole = run(model, cfg, token_rows())
    checkpoints = sorted(Path(cfg.checkpoint_path or "").iterdir(), key=lambda p: int(p.name))
    assert len(checkpoints) == 4
    for number, checkpoint in enumerate(checkpoints[::3]):
        prices = load_file(checkpoint / TENSORS_FILENAME)[TENSOR_NAME]
        assert (prices > 0.1).any()
        folder = tmp_path / str(number)
        again = config(folder, n_checkpoints=4, resume_from_checkpoint=str(checkpoint), **short)
        resumed = run(model, again, token_rows())
        assert_same_sae(resumed, whole)
        step = int(checkpoint.name) // BATCH
        assert steps_logged(folder / "output") == list(range(step, 90))
        # The checkpoints that were made are not made again.
        made = {path.name for path in Path(again.checkpoint_path or "").glob("*")}
        assert made == {c.name for c in checkpoints if int(c.name) > int(checkpoint.name)}


@pytest.mark.parametrize("normalization", ["layer_norm", "covariance_whitening"])
def test_a_run_is_looked_at_and_trained_with_every_normalization(
    model: Any, tmp_path: Path, normalization: Any
) -> None:
    sae = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, target_l0=7, normalize_activations=normalization
    )
    looked_at, not_looked_at = (
        run(
            model,
            config(tmp_path / str(look), sae=sae, training_tokens=30 * BATCH, lr_decay_steps=10),
            token_rows(),
            check_first=look,
        )
        for look in (True, False)
    )
    assert_same_sae(looked_at, not_looked_at)


def test_the_end_of_a_run_is_not_resumed(model: Any, tmp_path: Path) -> None:
    """Its weights are folded; resuming would scale the activations and fold the weights again."""
    cfg = config(tmp_path, save_final_checkpoint=True, training_tokens=40 * BATCH)
    run(model, cfg, token_rows())
    (final,) = Path(cfg.checkpoint_path or "").glob("final_*")
    longer = config(tmp_path / "on", training_tokens=50 * BATCH, resume_from_checkpoint=str(final))
    with pytest.raises(ValueError, match=r"normalized as 'none'.*jumprelu finetune"):
        run(model, longer, token_rows())
    from_it = config(tmp_path / "from", from_pretrained_path=str(final))
    with pytest.raises(ValueError, match=r"normalized as 'none'.*jumprelu finetune"):
        run(model, from_it, token_rows())
    assert not (tmp_path / "on").exists() and not (tmp_path / "from").exists()


def test_a_run_from_pretrained_weights_trains_for_its_own_target(
    model: Any, tmp_path: Path
) -> None:
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=100 * BATCH)  # for L0 7
    run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, target_l0=3, step_kernel="sparse")
    other = config(
        tmp_path / "other",
        sae=sae,
        from_pretrained_path=str(checkpoint),
        training_tokens=200 * BATCH,
    )
    trained = run(model, other, token_rows())
    assert trained.sae.cfg.target_l0 == trained.sae.control.l0.target == 3  # type: ignore[union-attr]
    assert trained.sae.cfg.metadata.l0 == pytest.approx(3, rel=0.1)


def test_a_checkpoint_without_the_buffer_is_smaller_and_resumes(model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=60 * BATCH)
    run(model, cfg, token_rows(), save_buffer=False)
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    state = load_file(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)
    assert not {"waiting", "serving"} & set(state)
    assert int(state["sequences_read"]) > 0
    again = config(
        tmp_path / "b", training_tokens=60 * BATCH, resume_from_checkpoint=str(checkpoint)
    )
    assert run(model, again, token_rows()).trainer.n_training_samples == 60 * BATCH


def test_a_checkpoint_of_a_longer_text_is_refused(model: Any, tmp_path: Path) -> None:
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=40 * BATCH)
    run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    again = config(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"sequences into the text.* 6: give the dataset"):
        run(model, again, token_rows(6))
    assert not (tmp_path / "b").exists()


def test_checkpoints_are_exchanged_with_saelens_own_runner(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # its handlers would outlive the test
    steps = {"training_tokens": 60 * BATCH}

    def theirs(cfg: Any) -> Any:
        return LanguageModelSAETrainingRunner(cfg, token_rows(), model).run()

    def ours(cfg: Any) -> Any:
        return run(model, cfg, token_rows()).sae

    for name, first, second in (("a", theirs, ours), ("b", ours, theirs)):
        first(config(tmp_path / name, n_checkpoints=1, **steps))
        (checkpoint,) = (tmp_path / name / "checkpoints").glob("*/*")
        again = config(tmp_path / name / "again", resume_from_checkpoint=str(checkpoint), **steps)
        assert second(again).W_dec.isfinite().all()
        assert (tmp_path / name / "again" / "output" / "cfg.json").exists()


def test_a_prefetching_run_is_saved_and_resumed(model: Any, tmp_path: Path) -> None:
    steps = {"training_tokens": 60 * BATCH, "prefetch_llm_batches": 2}
    cfg = config(tmp_path, n_checkpoints=1, **steps)
    run(model, cfg, token_rows())
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    again = config(tmp_path / "again", resume_from_checkpoint=str(checkpoint), **steps)
    assert run(model, again, token_rows()).trainer.n_training_samples == 60 * BATCH


# ---------------------------------------------------------------- whole, or not there


def failing(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("last_written", ["save_to_checkpoint", "save_trainer_state"])
def test_a_checkpoint_that_cannot_be_finished_is_not_there(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_written: str
) -> None:
    owner = ActivationsStore if last_written == "save_to_checkpoint" else JumpReLUTrainer
    monkeypatch.setattr(owner, last_written, failing)
    cfg = config(tmp_path, n_checkpoints=1, training_tokens=10 * BATCH)
    with pytest.raises(OSError, match="no space"):
        run(model, cfg, token_rows())
    assert list(Path(cfg.checkpoint_path or "").iterdir()) == []


def test_an_output_folder_that_cannot_be_finished_is_not_an_sae(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, training_tokens=10 * BATCH)
    with monkeypatch.context() as patch:
        # The last thing SAELens writes there; weights and config are on the disk by then.
        patch.setattr("sae_lens.llm_sae_training_runner.json.dump", failing)
        with pytest.raises(OSError, match="no space"):
            run(model, cfg, token_rows())
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["metrics.jsonl"]
    # So the same command can be given again.
    run(model, cfg, token_rows())
    assert steps_logged(tmp_path / "output") == list(range(10))


# ---------------------------------------------------------------- real signals

TRAIN = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_resume import config, run, tiny_hf, tiny_hooked, tiny_tokenizer, token_rows
folder = Path(sys.argv[1])
run(tiny_hooked(tiny_hf(), tiny_tokenizer(folder / "tokenizer")), config(folder), token_rows())
"""


def interrupted(command: Sequence[str], folder: Path, sent: signal.Signals) -> tuple[int, str]:
    """Run `command` until it has logged a few steps, send the signal, return exit code, stderr."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    metrics = folder / "output" / "metrics.jsonl"
    with open(folder / "stderr", "w+") as said:
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=said, cwd=folder
        )
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= 7:
                child.send_signal(sent)
                break
            time.sleep(0.01)
        try:
            code = child.wait(60)
        finally:
            child.kill()
        said.seek(0)
        return code, said.read()


def only_checkpoint(folder: Path) -> Path:
    (checkpoint,) = (folder / "checkpoints").glob("*/*")
    assert not checkpoint.name.startswith(".")  # no unfinished one beside it either
    assert 7 <= int(checkpoint.name) // BATCH < STEPS
    return checkpoint


def test_a_terminated_run_resumes_exactly(model: Any, tmp_path: Path) -> None:
    script = [sys.executable, "-c", TRAIN, str(tmp_path), str(Path(__file__).parent)]
    code, said = interrupted(script, tmp_path, signal.SIGTERM)
    assert code != 0 and "InterruptedException: interrupted; continue with" in said
    checkpoint = only_checkpoint(tmp_path)
    assert str(checkpoint) in said
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["metrics.jsonl"]
    before = steps_logged(tmp_path / "output")
    assert before == list(range(int(checkpoint.name) // BATCH))

    resumed = run(model, config(tmp_path, resume_from_checkpoint=str(checkpoint)), token_rows())
    assert steps_logged(tmp_path / "output") == list(range(STEPS))
    assert_same_sae(resumed, run(model, config(tmp_path / "whole"), token_rows()))


def test_ctrl_c_on_the_command_line_resumes_exactly(tmp_path: Path) -> None:
    """From a model folder and untokenised text, where one document spans many sequences."""
    folder, text = tmp_path / "model", tmp_path / "text"
    tiny_hf().save_pretrained(folder)
    tiny_tokenizer(folder)
    text.mkdir()
    words = torch.randint(4, VOCABULARY, (9, 331), generator=torch.Generator().manual_seed(6))
    documents = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
    (text / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    values = {
        "model_name": folder,
        "dataset_path": text,
        "streaming": False,
        "hook_name": RESIDUAL,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "target_l0": 7,
        "step_kernel": "sparse",
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 17,
        "n_batches_in_buffer": 17,
        "n_batches_for_norm_estimate": 3,
        "exclude_special_tokens": True,
        "log_to_wandb": False,
        "wandb_log_frequency": 1,
        "verbose": False,
        "checkpoint_path": tmp_path / "checkpoints",
        "output_path": tmp_path / "output",
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "jumprelu_plugin.cli.app", "train", *flags]
    code, said = interrupted(command, tmp_path, signal.SIGINT)
    checkpoint = only_checkpoint(tmp_path)
    assert code == 130, said[-2000:]
    assert said.rstrip().endswith(f"continue with --resume_from_checkpoint {checkpoint}")
    assert "Traceback" not in said

    def finish(*more: str) -> JumpReLUTrainingRunner:
        cfg = parse_flags(["--architecture", "jumprelu", *flags, *more])
        runner = JumpReLUTrainingRunner(cfg)
        runner.run()
        return runner

    resumed = finish("--resume_from_checkpoint", str(checkpoint))
    whole = finish("--output_path", str(tmp_path / "whole"))
    assert_same_sae(resumed, whole)


# ---------------------------------------------------------------- signals, seen from inside


class Stopping(JumpReLUTrainingRunner):
    """Sends the process signals after a number of training batches."""

    after: int
    times: int = 1

    def run(self) -> Any:
        store, steps = self.activations_store, 0
        draw = type(store).__next__

        class Counting(type(store)):
            def __next__(inner) -> torch.Tensor:  # noqa: N805
                nonlocal steps
                batch, steps = draw(inner), steps + 1
                if steps == self.after:
                    for _ in range(self.times):
                        signal.raise_signal(signal.SIGINT)
                return batch

        store.__class__ = Counting
        return super().run()


@pytest.mark.parametrize(
    ("after", "times", "path", "message"),
    [
        (2, 1, True, "nothing was saved"),  # while the scale is estimated
        (9, 2, True, "nothing was saved"),  # twice: at once
        (9, 1, False, "checkpoint_path is None"),
        (9, 1, True, "continue with"),
    ],
)
def test_what_an_interruption_saves(
    model: Any, tmp_path: Path, after: int, times: int, path: bool, message: str
) -> None:
    checkpoints = tmp_path / "checkpoints"
    cfg = config(tmp_path, checkpoint_path=str(checkpoints) if path else None)
    runner = Stopping(cfg, override_dataset=token_rows(), override_model=model)
    runner.after, runner.times = after, times
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(InterruptedException, match=message):
        runner.run()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = list(checkpoints.glob("*/*"))
    # Three batches for the scale, so the ninth batch is the sixth step.
    assert [p.name for p in saved] == ([str(6 * BATCH)] if message == "continue with" else [])
    assert not (tmp_path / "output" / "cfg.json").exists()
