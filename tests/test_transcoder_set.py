"""From a model to folders: harvesting pairs, one transcoder, all layers at once, and stopping."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from tiny import (
    BOS,
    D_MODEL,
    N_LAYERS,
    PAD,
    WIDTH,
    tiny_hf,
    tiny_hooked,
    tiny_tokenizer,
    tiny_tokens,
)
from torch import Tensor
from typer.testing import CliRunner

from jumprelu_plugin import recipes
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.evaluation import evaluate, evaluate_transcoders
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair, PairStore
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from jumprelu_plugin.training.transcoder_evaluator import folded_copy
from jumprelu_plugin.transcoders.memory import transcoder_parameters
from jumprelu_plugin.transcoders.per_layer import run as transcoder_set
from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings, train_transcoders
from jumprelu_plugin.transcoders.per_layer.runner import LayerwiseTrainer

LN, OUT, MID, Z = "ln2.hook_normalized", "hook_mlp_out", "hook_resid_mid", "attn.hook_z"
POSITIONS = 17


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tiny_hooked(tiny_hf(), tokenizer)


def text(sequences: int = 97) -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(sequences, POSITIONS).tolist()})


def store(model: Any, pairs: dict[str, HookPair], batch: int = 41, **changes: Any) -> PairStore:
    base = ActivationsStore(
        **{
            "model": model,
            "dataset": text(),
            "streaming": False,
            "hook_name": "blocks.1.hook_mlp_out",
            "hook_head_index": None,
            "context_size": POSITIONS,
            "d_in": D_MODEL,
            "n_batches_in_buffer": 13,
            "total_training_tokens": 999,
            "store_batch_size_prompts": 5,
            "train_batch_size_tokens": batch,
            "prepend_bos": True,
            "normalize_activations": "none",
            "device": torch.device("cpu"),
            "dtype": "float32",
            "exclude_special_tokens": torch.tensor([BOS, PAD]),
            **changes,
        }
    )
    return PairStore.like(base, pairs, pair_widths(model, pairs.values()), seed=3)


def pair(layer: int, hook_in: str = LN, hook_out: str = OUT) -> HookPair:
    return HookPair(f"blocks.{layer}.{hook_in}", f"blocks.{layer}.{hook_out}")


# ---------------------------------------------------------------- harvesting


def test_rows_are_both_hooks_of_one_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {"a": pair(0, Z, OUT), "b": pair(2)}
    found = store(model, pairs)
    passes = []
    run = model.run_with_cache
    monkeypatch.setattr(model, "run_with_cache", lambda *a, **k: passes.append(1) or run(*a, **k))
    loader = found.get_multi_hook_data_loader()
    taken = [next(loader) for _ in range(5)]
    # 15 sequences of 16 kept tokens: five batches of 41 from three passes for both pairs.
    assert len(passes) == 3
    monkeypatch.undo()
    sequences = torch.tensor(text().shuffle(seed=3)[:15]["tokens"])
    cache = model.run_with_cache(sequences)[1]
    places = []
    for name, hooks in pairs.items():
        rows = torch.cat([batch[name] for batch in taken])
        x, y = (cache[hook][:, 1:].flatten(0, 1).flatten(1) for hook in vars(hooks).values())
        whole = torch.cat([x, y], 1)
        assert rows.shape == (205, whole.shape[1])
        nearest = distances(rows, whole)
        assert nearest.min(1).values.max() < 1e-4  # each row is one token's two sides
        # None twice, but for tokens that look alike: the same word after BOS.
        assert len(nearest.argmin(1).unique()) == len(rows.round(decimals=4).unique(dim=0)) > 190
        places.append(nearest.argmin(1))
    assert torch.equal(*places)  # both pairs give the same tokens in the same order


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("taken", [0, 3, 5, 6, 37])
def test_a_store_goes_on_where_it_stood(model: Any, taken: int, tmp_path: Path) -> None:
    """Within a chunk, at its end, and into the next epoch."""
    one, other = store(model, {"": pair(1)}), store(model, {"": pair(1)})
    for _ in range(taken):
        next(one)
    one.save_to_checkpoint(tmp_path)
    other.load_from_checkpoint(tmp_path)
    for _ in range(7):
        assert torch.equal(next(one), next(other))


def test_reading_the_first_sequences_disturbs_nothing(model: Any) -> None:
    one, other = store(model, {"": pair(1)}), store(model, {"": pair(1)})
    for _ in range(9):
        assert one.first_sequences(4).shape == (4, POSITIONS)
        assert torch.equal(next(one), next(other))


def test_a_chunk_smaller_than_a_batch_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="15 sequences of 17 tokens give 240.*batch of 999"):
        next(store(model, {"": pair(1)}, batch=999))


def test_memory_of_a_chunk_is_what_it_holds(model: Any) -> None:
    found = store(model, {"a": pair(0, Z, OUT), "b": pair(2)}, exclude_special_tokens=None)
    harvest = found._harvest()
    assert found.chunk_bytes == sum(t.numel() * t.element_size() for t in harvest.values())


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (pair(1, OUT, OUT), "that is an SAE"),
        (pair(1, OUT, LN), "computed before"),
        (HookPair("blocks.2.hook_mlp_out", "blocks.0.hook_mlp_out"), "computed before"),
        (pair(1, LN, "attn.hook_result"), "does not fire"),
    ],
)
def test_pairs_that_cannot_be_spliced_are_refused(
    model: Any, hooks: HookPair, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pair_widths(model, [hooks])


# ---------------------------------------------------------------- one transcoder


def runner_config(output: Path, sae: Any, hook_in: str, **changes: Any) -> Any:
    return LanguageModelSAERunnerConfig(
        **{
            "sae": sae,
            "model_name": "tiny-gemma-2-test",
            "hook_name": hook_in,
            "training_tokens": 11 * 41,
            "train_batch_size_tokens": 41,
            "context_size": POSITIONS,
            "n_batches_in_buffer": 13,
            "store_batch_size_prompts": 5,
            "n_batches_for_norm_estimate": 3,
            "exclude_special_tokens": True,
            "lr": 3e-3,
            "checkpoint_path": None,
            "output_path": str(output),
            "verbose": False,
            "logger": LoggingConfig(log_to_wandb=False),
            "model_from_pretrained_kwargs": {},
            **changes,
        }
    )


def transcoder_config(skip: bool = False, **changes: Any) -> JumpReLUTrainingTranscoderConfig:
    kind = JumpReLUTrainingSkipTranscoderConfig if skip else JumpReLUTrainingTranscoderConfig
    fields = {"d_in": D_MODEL, "d_sae": 59, "target_l0": 7, "hook_name_out": f"blocks.1.{OUT}"}
    return kind(**{**fields, **changes})


@pytest.mark.parametrize(
    ("hook_in", "skip", "d_in"),
    [(LN, False, D_MODEL), (MID, True, D_MODEL), (Z, True, WIDTH[f"blocks.1.{Z}"])],
)
def test_our_runner_trains_a_transcoder(
    model: Any, hook_in: str, skip: bool, d_in: int, tmp_path: Path
) -> None:
    cfg = runner_config(tmp_path, transcoder_config(skip, d_in=d_in), f"blocks.1.{hook_in}")
    cfg.sae.d_out = D_MODEL
    runner = JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model)
    trained = runner.run()
    sae = SAE.load_from_disk(tmp_path)
    assert type(sae).__name__ == ("JumpReLUSkipTranscoder" if skip else "JumpReLUTranscoder")
    assert sae.cfg.metadata.hook_name == f"blocks.1.{hook_in}"
    assert sae.cfg.metadata.hook_name_out == f"blocks.1.{OUT}"
    x = torch.randn(5, d_in)
    torch.testing.assert_close(sae(x), trained(x), rtol=1e-5, atol=1e-6)
    result = evaluate(model, sae, tiny_tokens())
    # Unit rows start at an FVU of about 2 on this random model; eleven steps do not get far.
    assert 0 < result.fvu < 3
    assert result.hook_out == f"blocks.1.{OUT}"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines and "metrics/explained_variance" in lines[-1]


def test_evaluation_in_the_middle_of_training(model: Any, tmp_path: Path) -> None:
    cfg = runner_config(tmp_path, transcoder_config(skip=True), f"blocks.1.{LN}")
    runner = JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model)
    runner.run()
    # As it was before folding: the same function of scaled rows.
    sae: Any = runner.sae
    raw = SAE.load_from_disk(tmp_path)
    sae.fold_activation_norm_scaling_factor((1 / 0.7, 1 / 3.1))
    folded = folded_copy(sae, (0.7, 3.1))
    for (name, found), (_, expected) in zip(
        folded.state_dict().items(), raw.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)
    scaler: Any = type("Scaler", (), {"scaling_factor": (0.7, 3.1)})()
    found = runner.evaluator(sae, iter(()), scaler)
    assert set(found) == {f"evaluation/{name}" for name in ("delta_loss", "fvu", "l0")}
    assert 0 < found["evaluation/fvu"] < 3


def test_the_stock_runner_says_why_it_cannot(model: Any, tmp_path: Path) -> None:
    cfg = runner_config(tmp_path, transcoder_config(), f"blocks.1.{LN}")
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=text(), override_model=model)
    with pytest.raises(ValueError, match="SAELens' own runner reads one hook alone"):
        runner.run()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sae", "changes", "message"),
    [
        ({"hook_name_out": None}, {}, "needs an output hook"),
        ({"hook_name_out": "blocks.1.hook_mlp_uot"}, {}, "did you mean blocks.1.hook_mlp_out"),
        ({"d_out": 31}, {}, "d_out is 31, but .* are 33 wide: set d_out=33"),
        ({"d_in": 31}, {}, "d_in is 31, but .* set d_in=33"),
        ({}, {"hook_name": f"blocks.1.{OUT}"}, "that is an SAE"),
        ({}, {"hook_name": f"blocks.2.{LN}"}, "computed before"),
    ],
)
def test_a_run_that_cannot_work_is_refused(
    model: Any, sae: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = {"d_out": D_MODEL, **sae}
    cfg = runner_config(tmp_path, transcoder_config(**fields), f"blocks.1.{LN}", **changes)
    with pytest.raises(ValueError, match=message):
        JumpReLUTrainingRunner(cfg, override_dataset=text(), override_model=model)
    assert not any(tmp_path.iterdir())


def test_recipe_flags_make_the_transcoder_s_config() -> None:
    flags = ["--architecture", "jumprelu", *recipes.GEMMA_SCOPE_TRANSCODER.flags()]
    given = ["--d_in", "33", "--d_sae", "59", "--d_out", "37", "--hook_name_out", "blocks.1.x"]
    cfg: Any = _parse_cfg_args([*flags, *given]).sae
    assert type(cfg) is JumpReLUTrainingTranscoderConfig
    assert (cfg.d_in, cfg.d_out, cfg.d_sae) == (33, 37, 59)
    assert cfg.hook_name_out == cfg.metadata.hook_name_out == "blocks.1.x"
    expected = recipes.GEMMA_SCOPE_TRANSCODER.sae_config(33, 59)
    assert cfg.hyperparameter_units == expected.hyperparameter_units == "unit_rms"
    assert cfg.l0_coefficient == expected.l0_coefficient
    assert cfg.apply_b_dec_to_input is False


# ---------------------------------------------------------------- all layers at once


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take one path, whatever they take in time: sums then have one order."""
    recipe = recipes.TRANSCODER
    fixed = replace(recipe, sae=MappingProxyType({**recipe.sae, "step_kernel": "sparse"}))
    monkeypatch.setitem(recipes.RECIPES, "transcoder", fixed)


def settings(**changes: Any) -> TranscoderSettings:
    fields: dict[str, Any] = {
        "model_name": "tiny-gemma-2-test",
        "d_sae": 59,
        "target_l0": 7.0,
        "training_tokens": 13 * 41,
        "train_batch_size_tokens": 41,
        "context_size": POSITIONS,
        "store_batch_size_prompts": 5,
        "n_batches_in_buffer": 13,
        "n_batches_for_norm_estimate": 3,
        "n_checkpoints": 3,
        "lr": 3e-3,
    }
    return TranscoderSettings(**{**fields, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{layer.name}/{name}": value
        for layer in sorted(folder.glob("layer_*"))
        for name, value in load_file(layer / "sae_weights.safetensors").items()
    }


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put a step's number in the list: after it, the process is sent SIGINT, as by Ctrl-C."""
    steps: list[int] = []
    update = LayerwiseTrainer._update_pbar

    def wrapped(self: LayerwiseTrainer, *args: Any, **kwargs: Any) -> None:
        if self.n_training_steps in steps:
            signal.raise_signal(signal.SIGINT)
        update(self, *args, **kwargs)

    monkeypatch.setattr(LayerwiseTrainer, "_update_pbar", wrapped)
    before = signal.getsignal(signal.SIGINT)
    yield steps
    assert signal.getsignal(signal.SIGINT) is before


def test_every_layer_is_watched_and_its_alarm_names_it(
    model: Any, exact: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wild = settings(training_tokens=103 * 41, lr=1.0)
    with caplog.at_level("WARNING"):
        train_transcoders(tmp_path / "set", wild, model=model, dataset=text())
    lines = [json.loads(line) for line in (tmp_path / "set/metrics.jsonl").read_text().splitlines()]
    raised = {line["of"]: line for line in lines if line.get("alarm") == "loss spike"}
    names = [f"layer_{layer}" for layer in range(N_LAYERS)]
    assert sorted(raised) == names
    said = [record.getMessage() for record in caplog.records]
    for name, line in raised.items():
        assert line["step"] == 99 and "lower lr" in line["suggestion"]
        assert said.count(f"{name}, step 99: {line['message']}; {line['suggestion']}") == 1
    measured = [line for line in lines if "layer_0" in line]
    assert all("health/encoder_growth" in measured[-1][name] for name in names)


@pytest.mark.parametrize("skip", [False, True])
def test_all_layers_stopped_and_resumed_are_the_uninterrupted_run(
    model: Any, skip: bool, exact: None, stop_at: list[int], tmp_path: Path
) -> None:
    said: list[Any] = []
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    train_transcoders(whole, settings(skip=skip), model=model, dataset=text(), log=said.append)
    assert said and str(said[0]).startswith("memory: ")
    names = [f"layer_{layer}" for layer in range(N_LAYERS)]
    assert sorted(p.name for p in whole.iterdir()) == [*names, "metrics.jsonl", "transcoders.json"]
    record = json.loads((whole / "transcoders.json").read_text())
    assert [layer["folder"] for layer in record["layers"]] == names
    assert record["layers"][2]["hook_name"] == f"blocks.2.{LN}"
    assert record["settings"]["d_sae"] == 59 and record["provenance"]["seed"] == 0

    for step in (4, 9):
        stop_at[:] = [step]
        with pytest.raises(InterruptedException):
            train_transcoders(paused, settings(skip=skip), model=model, dataset=text())
        (checkpoint,) = (paused / "checkpoints").iterdir()
        assert checkpoint.name == str(step * 41)
        assert not list(paused.glob("layer_*"))
    stop_at.clear()
    train_transcoders(paused, settings(skip=skip), model=model, dataset=text())
    assert not (paused / "checkpoints").exists()
    found, expected = weights(paused), weights(whole)
    assert len(found) == len(names) * (6 if skip else 5)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    model: Any, exact: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_transcoders(whole, settings(), model=model, dataset=text())
    update = LayerwiseTrainer._update_pbar

    def dies(self: LayerwiseTrainer, *args: Any, **kwargs: Any) -> None:
        if self.n_training_steps == 8:
            raise SystemError("killed")
        update(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(LayerwiseTrainer, "_update_pbar", dies)
        train_transcoders(killed, settings(), model=model, dataset=text())
    train_transcoders(killed, settings(), model=model, dataset=text())
    for name, value in weights(whole).items():
        assert torch.equal(weights(killed)[name], value), name


def test_layers_and_hooks_can_be_chosen(model: Any, tmp_path: Path) -> None:
    chosen = settings(
        layers=(0, 2), hook_name="blocks.{layer}." + Z, hook_name_out="blocks.{layer}." + MID
    )
    train_transcoders(tmp_path / "out", chosen, model=model, dataset=text())
    folders = sorted((tmp_path / "out").glob("layer_*"))
    assert [folder.name for folder in folders] == ["layer_0", "layer_2"]
    sae = SAE.load_from_disk(folders[1])
    assert (sae.cfg.d_in, sae.cfg.d_out) == (WIDTH[f"blocks.1.{Z}"], D_MODEL)  # type: ignore[attr-defined]
    assert sae.cfg.metadata.hook_name_out == f"blocks.2.{MID}"


def test_output_folders_are_not_overwritten(model: Any, stop_at: list[int], tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty"):
        train_transcoders(tmp_path / "foreign", settings(), model=model, dataset=text())
    stop_at[:] = [3]
    with pytest.raises(InterruptedException):
        train_transcoders(tmp_path / "out", settings(), model=model, dataset=text())
    with pytest.raises(ValueError, match=r"unfinished run with lr=0\.003, and lr is 0\.1 now"):
        train_transcoders(tmp_path / "out", settings(lr=0.1), model=model, dataset=text())
    stop_at.clear()
    train_transcoders(tmp_path / "out", settings(), model=model, dataset=text())
    with pytest.raises(ValueError, match="already holds finished"):
        train_transcoders(tmp_path / "out", settings(), model=model, dataset=text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 3)}, "no layer 3"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, r"must both hold \{layer\}"),
        ({"hook_name_out": "blocks.{layer}.hook_mlp_uot"}, "no hook 'blocks.0.hook_mlp_uot'"),
        ({"recipe": "gemma_scope"}, "no recipe 'gemma_scope' for transcoders"),
        ({"memory_gb": 1e-4}, "more than memory_gb=0.0001"),
        ({"training_tokens": 40}, "less than a batch"),
    ],
)
def test_a_set_that_cannot_be_trained_is_refused(
    model: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_transcoders(tmp_path / "out", settings(**changes), model=model, dataset=text())


def test_the_chunk_shrinks_to_the_memory(model: Any, tmp_path: Path) -> None:
    said: list[Any] = []
    big = settings(n_batches_in_buffer=100_000, memory_gb=0.002, training_tokens=3 * 41)
    train_transcoders(tmp_path / "out", big, model=model, dataset=text(), log=said.append)
    record = json.loads((tmp_path / "out" / "transcoders.json").read_text())
    assert record["memory_estimate"]["total"] <= 2_000_000
    sae = SAE.load_from_disk(tmp_path / "out" / "layer_1")
    counted = transcoder_parameters(transcoder_config())
    assert counted == sum(parameter.numel() for parameter in sae.parameters())


MEASURE = """
import resource, sys
from jumprelu_plugin.models.language_models import load_model
from jumprelu_plugin.models.text import tokenized_dataset
from jumprelu_plugin.transcoders.per_layer.run import TranscoderSettings, train_transcoders
model = load_model()
text = tokenized_dataset(model.tokenizer, 128, "train")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, said = peak(), []
settings = TranscoderSettings(
    layers=(0, 5), d_sae=8192, training_tokens=5 * 2048, train_batch_size_tokens=2048,
    n_batches_in_buffer=512, n_batches_for_norm_estimate=2, n_checkpoints=0, evaluation_sequences=0,
)
train_transcoders(sys.argv[1], settings, model=model, dataset=text, log=said.append)
print("grew", peak() - before)
"""


@pytest.mark.slow
def test_the_stated_memory_is_kept(tmp_path: Path) -> None:
    """The peak of a process, beyond what it held with the model loaded."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grew = float(done.stdout.split("grew")[1])
    record = json.loads((tmp_path / "out" / "transcoders.json").read_text())["memory_estimate"]
    # 100 MB for what libraries load on first use.
    stated = record["total"] - record["model"]
    assert 0.3 * stated < grew < stated + 1e8, (grew, record)


# ---------------------------------------------------------------- splicing a whole set


def stock_transcoder(layer: int, seed: int) -> JumpReLUSkipTranscoder:
    config = JumpReLUSkipTranscoderConfig(
        d_in=D_MODEL,
        d_sae=41,
        d_out=D_MODEL,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(
            hook_name=f"blocks.{layer}.{LN}", hook_name_out=f"blocks.{layer}.{OUT}"
        ),
    )
    made: Any = JumpReLUSkipTranscoder(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.rand(parameter.shape, generator=g) - 0.07)
    return made.eval()


def test_a_spliced_set_is_what_hooks_by_hand_give(model: Any) -> None:
    transcoders = [stock_transcoder(layer, layer) for layer in range(N_LAYERS)]
    tokens = tiny_tokens(7, 13)
    found = evaluate_transcoders(model, transcoders, tokens, batch_size=3, special_token_ids=[BOS])

    kept: dict[int, Tensor] = {}

    def hooks(layer: int) -> list[Any]:
        def read(x: Tensor, hook: Any) -> None:
            kept[layer] = x

        def write(y: Tensor, hook: Any) -> Tensor:
            changed = transcoders[layer](kept[layer])
            return torch.cat([y[:, :1], changed[:, 1:]], 1)  # BOS, the first, stays

        return [(f"blocks.{layer}.{LN}", read), (f"blocks.{layer}.{OUT}", write)]

    def loss(logits: Tensor) -> float:
        predictions = logits[:, 1:-1].flatten(0, 1)
        return F.cross_entropy(predictions, tokens[:, 2:].flatten()).item()

    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens)
        spliced = model.run_with_hooks(
            tokens, fwd_hooks=[h for layer in range(N_LAYERS) for h in hooks(layer)]
        )
        assert found.n_predictions == 7 * 11
        assert found.loss_clean == pytest.approx(loss(clean), rel=1e-5)
        assert found.loss_spliced == pytest.approx(loss(spliced), rel=1e-5)
        assert abs(found.delta_loss) > 1e-3
        assert found.loss_mean_ablated != pytest.approx(found.loss_clean, rel=1e-4)
        for layer, fidelity in enumerate(found.layers):
            x = cache[f"blocks.{layer}.{LN}"][:, 1:].flatten(0, 1)
            y = cache[f"blocks.{layer}.{OUT}"][:, 1:].flatten(0, 1)
            error = (transcoders[layer](x) - y).square().sum()
            fvu = error / (y - y.mean(0)).square().sum()
            assert fidelity.fvu == pytest.approx(fvu.item(), rel=1e-4)
            fires = (transcoders[layer].encode(x) > 0).float()
            assert fidelity.l0 == pytest.approx(fires.sum(1).mean().item(), rel=1e-5)
    assert not model.blocks[1].hook_mlp_out.fwd_hooks


def test_sets_that_cannot_be_spliced_are_refused(model: Any) -> None:
    tokens = tiny_tokens(3, 7)
    with pytest.raises(ValueError, match="no transcoders"):
        evaluate_transcoders(model, [], tokens)
    with pytest.raises(ValueError, match="Two transcoders write to one hook"):
        evaluate_transcoders(model, [stock_transcoder(1, 0), stock_transcoder(1, 1)], tokens)
    unfolded = stock_transcoder(1, 0)
    unfolded.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match="Fold the scale"):
        evaluate_transcoders(model, [unfolded], tokens)


# ---------------------------------------------------------------- the command


def test_the_command_hands_over_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def run(output: Path, chosen: TranscoderSettings, log: Any) -> Path:
        given.append((output, chosen))
        return output

    monkeypatch.setattr(transcoder_set, "train_transcoders", run)
    flags = (
        "--training_tokens 99 --target_l0 7 --d_sae 59 --skip --layers 0-2,4 --memory_gb 3 --seed 5"
    )
    arguments = [
        "train-transcoders",
        "--model_name",
        "m",
        "--output_path",
        str(tmp_path),
        *flags.split(),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = TranscoderSettings(
        model_name="m",
        training_tokens=99,
        target_l0=7.0,
        d_sae=59,
        skip=True,
        layers=(0, 1, 2, 4),
        memory_gb=3.0,
        seed=5,
    )
    assert given == [(tmp_path, expected)]
    result = CliRunner().invoke(app, [*arguments, "--layers", "one"])
    assert result.exit_code == 2 and "--layers is 'one'" in result.output
