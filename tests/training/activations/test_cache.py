"""Activations on disk are the model's, in a seeded order, and read only by runs they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from jumprelu_plugin.models.hooks import flat_heads
from jumprelu_plugin.records import read_json, write_json
from jumprelu_plugin.training.activations.cache import writer
from jumprelu_plugin.training.activations.cache.coding import (
    Standardization,
    decode_rows,
    encode_rows,
)
from jumprelu_plugin.training.activations.cache.manifest import MANIFEST_FILENAME, CacheManifest
from jumprelu_plugin.training.activations.cache.reader import ActivationCache
from jumprelu_plugin.training.activations.cache.writer import write_activation_cache
from tests.interrupted_runs import interrupted_after
from tests.tiny import HEADS, RESIDUAL, SPECIAL_TOKENS, WIDTH
from tests.training.runs import CONTEXT, assert_same_sae, config, run, token_rows

SHARD, HOOKS = 13, [RESIDUAL, HEADS]


def tokens() -> torch.Tensor:
    found = torch.tensor(token_rows()["tokens"])
    found[5, 7:] = 0  # padding
    return found


def write(folder: Path, model: Any, **changes: Any) -> CacheManifest:
    given = {"hook_names": HOOKS, "tokens": tokens(), "sequences_per_shard": SHARD}
    named = {"model_name": "tiny", "model_class_name": "HookedTransformer", "batch_size": 11}
    return write_activation_cache(folder, model, **{**given, **named, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model: Any) -> ActivationCache:
    folder = tmp_path_factory.mktemp("cache") / "float32"
    write(folder, model)
    return ActivationCache(folder)


@torch.no_grad()
def expected(model: Any, hook: str) -> torch.Tensor:
    """The activations of all tokens that are not special, from a pass of their own."""
    _, found = model.run_with_cache(tokens(), prepend_bos=False)
    return flat_heads(found[hook])[tokens() >= len(SPECIAL_TOKENS)]


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    # By all columns: rows of the same token differ in their last bits, or not, as the processor has
    # it, and those that agree in the first column may come in any order.
    return rows[numpy.lexsort(rows.T.flip(0).numpy())]


@pytest.mark.parametrize("hook", HOOKS)
def test_it_holds_every_activation_once(cache: ActivationCache, model: Any, hook: str) -> None:
    rows = torch.cat(list(cache.rows(hook)))
    wanted = expected(model, hook)
    assert rows.shape == (cache.n_rows, WIDTH[hook]) == wanted.shape
    torch.testing.assert_close(sorted_rows(rows), sorted_rows(wanted))
    torch.testing.assert_close(cache.mean(hook), wanted.mean(0))
    assert not torch.equal(rows, wanted)  # shuffled


def test_rows_of_two_hooks_are_of_the_same_tokens(cache: ActivationCache, model: Any) -> None:
    residual, heads = (torch.cat(list(cache.rows(hook))) for hook in HOOKS)
    wanted = torch.cat([expected(model, hook) for hook in HOOKS], 1)
    torch.testing.assert_close(sorted_rows(torch.cat([residual, heads], 1)), sorted_rows(wanted))


def test_a_pass_serves_every_row_once_and_any_position_can_be_resumed(
    cache: ActivationCache,
) -> None:
    size = 31
    batches = cache.batches(RESIDUAL, size, seed=7)
    served = torch.cat([next(batches) for _ in range(2 * cache.n_rows // size + 1)])
    everything = sorted_rows(torch.cat(list(cache.rows(RESIDUAL))))
    first, second = served[: cache.n_rows], served[cache.n_rows : 2 * cache.n_rows]
    for epoch in (first, second):
        assert torch.equal(sorted_rows(epoch), everything)
    assert not torch.equal(first, second)
    other = cache.batches(RESIDUAL, size, seed=8)
    assert not torch.equal(next(other), served[:size])
    for steps in (0, 1, 9, 30):
        resumed = cache.batches(RESIDUAL, size, seed=7)
        resumed.served = steps * size
        assert torch.equal(next(resumed), served[steps * size : (steps + 1) * size])


def test_bfloat16_rounds_as_torch_does(cache: ActivationCache, model: Any, tmp_path: Path) -> None:
    write(tmp_path / "c", model, dtype="bfloat16")
    for half, full in zip(
        ActivationCache(tmp_path / "c").rows(HEADS), cache.rows(HEADS), strict=True
    ):
        assert torch.equal(half, full.bfloat16().float())


def test_int8_errs_by_at_most_half_a_level_of_each_coordinate(
    cache: ActivationCache, model: Any, tmp_path: Path
) -> None:
    manifest = write(tmp_path / "c", model, dtype="int8")
    small = ActivationCache(tmp_path / "c")
    assert manifest.n_bytes == cache.n_rows * (sum(WIDTH[h] + 4 for h in HOOKS))
    for hook in HOOKS:
        rows, rounded = (torch.cat(list(c.rows(hook))) for c in (cache, small))
        first = next(iter(cache.rows(hook)))
        spread = first.std(0, correction=0)
        levels = ((rows - first.mean(0)) / spread).abs().amax(1, keepdim=True) / 127
        assert ((rows - rounded).abs() <= 0.502 * levels * spread + 1e-6).all()
        assert torch.equal(small.mean(hook), cache.mean(hook))


def test_int8_keeps_small_coordinates_beside_a_massive_one() -> None:
    rows = torch.randn(311, 7, generator=torch.Generator().manual_seed(2))
    rows[:, 3] = 6_000 + 900 * rows[:, 3]
    stored = encode_rows(rows, "int8", standard := Standardization.of(rows))
    error = decode_rows(stored["values"], stored["scale"], standard) - rows
    assert (error.square().mean(0) / rows.var(0)).max() < 2e-4


def test_what_does_not_vary_is_kept(tmp_path: Path) -> None:
    rows = torch.full((5, 3), 2.5)
    stored = encode_rows(rows, "int8", standard := Standardization.of(rows))
    assert torch.equal(decode_rows(stored["values"], stored["scale"], standard), rows)


# ---------------------------------------------------------------- interruption


def test_a_killed_writer_goes_on_with_the_shards_that_are_missing(
    cache: ActivationCache, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    save, calls = writer.save_file, []

    def killed(tensors: Any, path: Path) -> None:
        calls.append(path)
        save(tensors, path)
        if len(calls) == 4:  # written beside and not yet renamed
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, model)
    with pytest.raises(ValueError, match="3 of 6 shards are missing"):
        ActivationCache(folder)
    monkeypatch.setattr(writer, "save_file", save)
    said: list[str] = []
    write(folder, model, log=said.append)
    assert "3 shards" in said[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        p.name for p in cache.folder.iterdir()
    )
    for one, other in zip(ActivationCache(folder).rows(HEADS), cache.rows(HEADS), strict=True):
        assert torch.equal(one, other)
    write(folder, model, log=said.append)
    assert "already" in said[-1]


def test_a_cache_of_more_hooks_is_one_of_fewer(
    cache: ActivationCache, model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache.folder, folder)
    cache.manifest.shard(folder, 2).unlink()
    said: list[str] = []
    found = write(folder, model, hook_names=[HEADS], log=said.append)  # goes on with both
    assert list(found.hooks) == HOOKS and "1 shards" in said[0]
    write(folder, model, hook_names=[RESIDUAL], log=said.append)
    assert "already" in said[-1]
    for one, other in zip(
        ActivationCache(folder).rows(RESIDUAL), cache.rows(RESIDUAL), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="holds other activations.*hooks"):
        write(folder, model, hook_names=[RESIDUAL, "blocks.0.hook_mlp_out"])
    with pytest.raises(ValueError, match="holds other activations.*seed"):
        write(folder, model, hook_names=[RESIDUAL], seed=7)


def test_a_resumed_training_equals_the_uninterrupted_one(
    cache: ActivationCache, model: Any, tmp_path: Path, one_thread: None
) -> None:
    def cfg(name: str, **fields: Any) -> Any:
        fields = {"training_tokens": 60 * 31, "lr_decay_steps": 10, **fields}
        fields["seqpos_slice"] = (0, None)  # all of them, as the cache has it
        return config(tmp_path / name, dataset_path="", **fields)

    options = {"activations": cache.folder, "check_first": False}
    text = token_rows()
    whole = run(model, cfg("whole"), text, **options)
    with interrupted_after(37):
        run(model, cfg("cut"), text, **options)
    (saved,) = (tmp_path / "cut" / "checkpoints").rglob("cfg.json")
    resumed = cfg("resumed", resume_from_checkpoint=str(saved.parent))
    with pytest.raises(ValueError, match="read an activation cache; .* the same --activations"):
        run(model, resumed, text, check_first=False)
    assert_same_sae(run(model, resumed, text, **options), whole)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4'.*float32, bfloat16, int8"),
        ({"hook_names": ["blocks.1.hook_resid_pots"]}, "hook_resid_pots.*Close names"),
        ({"hook_names": []}, "at least one hook"),
        ({"tokens": torch.full((3, CONTEXT), 2)}, "all 39 tokens are special"),
        ({"sequences_per_shard": 0}, "sequences_per_shard is 0"),
    ],
)
def test_refused_before_anything_is_written(
    model: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "c", model, **changes)
    assert not (tmp_path / "c").exists()


def test_too_small_a_disk(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20 + 1000)
    )
    said: list[str] = []
    with pytest.raises(OSError, match="take 0.20 MB and .* has 67.11 MB free.*int8"):
        write(tmp_path / "c", model, log=said.append)
    assert "798 tokens at 2 hooks in float32 take 0.20 MB in 6 shards" in said[0]
    assert not (tmp_path / "c").exists()


def test_another_text_does_not_go_on_in_the_folder(
    cache: ActivationCache, model: Any, tmp_path: Path
) -> None:
    shutil.copytree(cache.folder, tmp_path / "c")
    with pytest.raises(ValueError, match="other activations than asked for .text_digest"):
        write(tmp_path / "c", model, tokens=tokens().flip(0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not an activation cache"):
        write(tmp_path / "mine", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: setattr(cfg, "hook_name", "blocks.0.hook_resid_post"), "it holds blocks.1"),
        (lambda cfg: setattr(cfg, "model_name", "gpt2"), "model_name is 'tiny' in the cache and"),
        (lambda cfg: setattr(cfg, "dataset_path", "text"), "dataset_path is '' in the cache and"),
        (lambda cfg: setattr(cfg, "context_size", 12), "context_size is 13 in the cache and 12"),
        (lambda cfg: setattr(cfg, "exclude_special_tokens", False), "exclude_special_tokens"),
        (lambda cfg: setattr(cfg, "exclude_special_tokens", [2, 7]), r"\[0, 1, 2\] in the cache"),
        (lambda cfg: setattr(cfg, "seqpos_slice", (1, None)), r"\(None,\) in the cache and \(1,"),
        (lambda cfg: setattr(cfg, "disable_concat_sequences", True), "False in the cache and True"),
        (lambda cfg: setattr(cfg, "sequence_separator_token", "eos"), "'bos' in the cache and 'eo"),
        (lambda cfg: setattr(cfg, "autocast_lm", True), "autocast_lm is False in the cache"),
    ],
)
def test_a_run_that_the_cache_is_not_of(
    cache: ActivationCache,
    model: Any,
    tmp_path: Path,
    change: Callable[[Any], None],
    message: str,
) -> None:
    cfg = config(tmp_path, dataset_path="")
    change(cfg)
    with pytest.raises(ValueError, match=message):
        run(model, cfg, token_rows(), activations=cache.folder)
    assert not any(tmp_path.iterdir())


def test_other_weights(cache: ActivationCache, model: Any, tmp_path: Path) -> None:
    weight = model.blocks[0].mlp.W_in
    before = weight.data[0, 0].item()
    weight.data[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="is of another model: its weights have the digest"):
            run(model, config(tmp_path, dataset_path=""), token_rows(), activations=cache.folder)
    finally:
        weight.data[0, 0] = before


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "activations.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="is not the manifest of"):
        ActivationCache(tmp_path)
    with pytest.raises(ValueError, match="is not an activation cache"):
        ActivationCache(tmp_path / "nothing")


def test_too_large_a_batch(cache: ActivationCache) -> None:
    with pytest.raises(ValueError, match="a batch has 10000 tokens and the activation cache"):
        cache.batches(RESIDUAL, 10_000)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shard_rows", [3, "7"]),
        ("shard_rows", []),
        ("hooks", {RESIDUAL: -1}),
        ("dtype", ["int8"]),
        ("n_sequences", True),
        ("of a later version", 1),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_refused_by_name(
    cache: ActivationCache, tmp_path: Path, field: str, value: Any
) -> None:
    manifest = read_json(cache.folder / MANIFEST_FILENAME)
    write_json(tmp_path / MANIFEST_FILENAME, {**manifest, field: value})
    with pytest.raises(ValueError, match="activations.json is not the manifest"):
        ActivationCache(tmp_path)


def test_a_shard_of_another_cache_is_refused(cache: ActivationCache, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache.folder, tmp_path / "c"))
    shards = sorted(folder.glob("shard_*"))
    shutil.copy(shards[-1], shards[0])  # the last one holds fewer rows
    with pytest.raises(ValueError, match=f"{shards[0].name} has .* of shape"):
        list(ActivationCache(folder).rows(RESIDUAL))
