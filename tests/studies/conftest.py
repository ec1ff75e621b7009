"""A random Gemma 2 with its tokenizer, and a text of its words, in folders."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from jumprelu_plugin.recipes import DEFAULT
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.studies.sweep.architectures import ARCHITECTURES, PLUGIN
from tests.tiny import SPECIAL_TOKENS, VOCABULARY, tiny_hf, tiny_tokenizer


@pytest.fixture(scope="session")
def model_and_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of the model and of the text."""
    root = tmp_path_factory.mktemp("studies")
    tiny_hf().save_pretrained(root / "model")
    tiny_tokenizer(root / "model")
    words = random.Random(3)
    lines = [
        json.dumps(
            {
                "text": " ".join(
                    f"w{words.randrange(len(SPECIAL_TOKENS), VOCABULARY)}" for _ in range(200)
                )
            }
        )
        for _ in range(20)
    ]
    (root / "text").mkdir()
    (root / "text" / "train.jsonl").write_text("\n".join(lines))
    return str(root / "model"), str(root / "text")


def _with_one_kernel(d_in: int, d_sae: int, l0: float) -> Any:
    cfg = DEFAULT.sae_config(d_in, d_sae, target_l0=l0, step_kernel="sparse")
    return JumpReLUTrainingSAE(cfg)


@pytest.fixture(scope="module")
def one_kernel() -> Iterator[None]:
    """No kernel chosen by timing, so that a training repeated has the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, PLUGIN, _with_one_kernel)
        yield
