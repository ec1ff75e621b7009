"""Activations of two hooks of the same tokens, for several layers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair, PairStore
from jumprelu_plugin.training.health.sample import first_rows
from tests.tiny import BOS, D_MODEL, PAD
from tests.training.transcoder_runs import LN, OUT, POSITIONS, Z, text


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
        # Tokens that look alike, the same word after BOS, are known by the first of them.
        first_alike = (distances(whole, whole) < 1e-4).int().argmax(1)
        place = first_alike[nearest.argmin(1)]
        used, there = (at.bincount(minlength=len(whole)) for at in (place, first_alike))
        assert (used <= there).all()  # none twice
        places.append(place)
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


def test_text_that_gives_no_activations_does_not_run_for_ever(model: Any) -> None:
    short = Dataset.from_dict({"text": ["w5 w6 w7"]})
    with pytest.raises(ValueError, match="too little text: .* context_size 17; give more text"):
        next(store(model, {"": pair(1)}, dataset=short))
    special = Dataset.from_dict({"tokens": [[BOS, *[PAD] * (POSITIONS - 1)]] * 5})
    for read in (next, lambda empty: first_rows(empty, None, 7)):
        with pytest.raises(ValueError, match="special tokens alone.*give more text"):
            read(store(model, {"": pair(1)}, dataset=special, n_batches_in_buffer=600))
