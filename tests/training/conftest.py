"""A model, texts and an SAE on disk, sound and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from jumprelu_plugin.cli.console import console
from tests.tiny import tiny_hf, tiny_sae, tiny_tokenizer


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line breaks in messages."""
    monkeypatch.setenv("TERMINAL_WIDTH", "2000")
    monkeypatch.setenv("COLUMNS", "2000")
    # A console that was made while another test had set COLUMNS keeps that width.
    monkeypatch.setattr(console, "_width", None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same with an infinite weight, the same without tokenizer; texts; an SAE."""
    root = tmp_path_factory.mktemp("folders")
    hf = tiny_hf()
    hf.save_pretrained(root / "model")
    shutil.copytree(root / "model", root / "no_tokenizer")
    tiny_tokenizer(root / "model")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    hf.save_pretrained(root / "infinite")
    tiny_tokenizer(root / "infinite")
    texts = {"text": " ".join(["w7 w11 w5 w9"] * 500), "short": "w7 w11 w5", "none": ""}
    for name, text in texts.items():
        (root / name).mkdir()
        line = json.dumps({"text": text}) + "\n" if text else ""
        (root / name / "train.jsonl").write_text(line)
    (root / "empty").mkdir()
    sae = tiny_sae()
    sae.cfg.metadata.model_name = str(root / "model")
    sae.save_model(root / "sae")
    return root
