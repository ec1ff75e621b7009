"""What an evaluation reports."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from jumprelu_plugin.evaluation import LanguageModelLoss, evaluate
from tests.tiny import RESIDUAL, tiny_sae


def test_the_report_holds_every_number(models, tokens, tmp_path):
    found = evaluate(models.hooked, tiny_sae(), tokens)
    text = StringIO()
    Console(file=text, width=120).print(found.table())
    for shown in (RESIDUAL, "jumprelu", "tiny-gemma-2-test", "78 tokens in 7 sequences",
                  f"{found.delta_loss:.4f}", f"{found.loss_mean_ablated:.4f}", f"{found.fvu:.4f}",
                  f"{found.l0:.2f}", f"{found.dead_share:.2%}"):  # fmt: skip
        assert shown in text.getvalue()
    path = found.save(tmp_path / "e.json", {"seed": 3}, frequencies=True)
    record = json.loads(path.read_text())
    assert record["kind"] == "evaluation"
    assert record["provenance"] == {"seed": 3}
    assert record["result"].pop("firing_frequency") == found.firing_frequency.tolist()
    assert record["result"] == found.to_dict()
    assert record["result"]["d_sae"] == 41
    assert "torch" in json.loads(found.save(path).read_text())["provenance"]["versions"]


def test_a_fraction_that_does_not_exist_is_none():
    harmless = LanguageModelLoss(3.0, 3.5, 2.9, 2.8, 5)
    assert harmless.fraction_recovered is None
    assert LanguageModelLoss(3.0, 3.5, 5.0, 9.0, 5).fraction_recovered == pytest.approx(0.75)
