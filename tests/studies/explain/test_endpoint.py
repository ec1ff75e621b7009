"""A real HTTP endpoint: good, slow, limiting, broken and hostile; its budget and its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.studies.explain.calls import CallLog
from jumprelu_plugin.studies.explain.cost import estimate
from jumprelu_plugin.studies.explain.endpoint import (
    MOST_FAILURES,
    Endpoint,
    StudyStopped,
    endpoint_roles,
)
from jumprelu_plugin.studies.explain.latents import StudyLatent
from jumprelu_plugin.studies.explain.prompts import (
    LONGEST_EXPLANATION,
    explain_messages,
    marked_text,
    read_explanation,
    read_numbers,
)
from jumprelu_plugin.studies.explain.report import write_explanation_report
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from jumprelu_plugin.studies.explain.study import explain_and_score
from jumprelu_plugin.studies.sampling.latents import SampledLatent
from tests.studies.explain.chat_server import HOSTILE, chat_server, completion
from tests.studies.explain.perfect import some_windows

SETTINGS = ExplainSettings(seed=5)
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]


def backend(url: str, **more: Any) -> BackendSettings:
    return BackendSettings(**{"llm_name": "m", "base_url": url, "retries": 2, "timeout_s": 5.0,
                              **more})  # fmt: skip


def latents(count: int = 3) -> list[StudyLatent]:
    return [
        StudyLatent("a", "/a", SampledLatent(i, 0.01, 0), some_windows(i), some_windows(90 + i))
        for i in range(count)
    ]


def test_a_study_and_its_repetition_without_a_request(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    with chat_server(delay=0.01) as server:
        settings = backend(server.url, concurrency=3)
        first = explain_and_score(latents(), endpoint_roles(settings, CallLog(log)), SETTINGS)
        asked = len(server.requests)
        assert asked == len({json.dumps(r) for r in server.requests})
        assert 1 < server.most_at_once <= 3
    # 3 explanations, 6 contexts for it and one null each (the shuffled one is the same text), and
    # two judgements each.
    assert asked <= estimate(latents(), SETTINGS, settings).requests
    assert all(each.explanation == "the sea" for each in first.latents)
    assert all(each.correlation is not None and each.correlation > 0.8 for each in first.latents)
    assert all(each.detection_auc == pytest.approx(0.75) for each in first.latents)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == asked and all(call["request"]["messages"] for call in calls)
    # The server is gone: everything is answered from the file.
    again = explain_and_score(latents(), endpoint_roles(settings, CallLog(log)), SETTINGS)
    assert again == first


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with chat_server() as server:
        roles = endpoint_roles(backend(server.url), CallLog(tmp_path / "calls.jsonl"))
        result = explain_and_score(latents(1), roles, SETTINGS)
        assert set(server.keys) == {"Bearer sk-very-secret"}
    assert "secret" not in (tmp_path / "calls.jsonl").read_text() + repr(result)


def test_a_limiting_endpoint_is_waited_for() -> None:
    def behave(number: int) -> tuple[int, dict[str, str], Any]:
        limited = number in (0, 2)
        return (429, {"Retry-After": "0.05"}, {"error": {}}) if limited else (200, {}, None)

    with chat_server(behave=behave) as server:
        endpoint = Endpoint(backend(server.url, concurrency=1), CallLog())
        assert endpoint.complete([(MESSAGES, 5), (MESSAGES, 6)]) == ["", ""]
        assert len(server.requests) == 4 and endpoint.budget.used == 100


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"<html>gateway</html>",
        {},
        {"choices": []},
        {"choices": None},
        completion(None),
        completion([1]),
        b"null",
    ],
)
def test_malformed_replies_are_failures_and_not_kept(body: Any) -> None:
    with chat_server(behave=lambda number: (200, {}, body)) as server:
        log = CallLog()
        endpoint = Endpoint(backend(server.url, retries=0, concurrency=1), log)
        assert endpoint.complete([(MESSAGES, 5)] * 3) == [None] * 3
        assert len(log) == 0
        with pytest.raises(StudyStopped, match=f"{MOST_FAILURES} requests in a row to http"):
            endpoint.complete([(MESSAGES, 5)] * 3)
        # A failed request may have been charged, so it counts in full.
        assert endpoint.budget.used == MOST_FAILURES * (2 + 16 + 5 + 16 + 5)


def test_one_failure_costs_one_score_alone() -> None:
    def behave(number: int) -> tuple[int, dict[str, str], Any]:
        return (500, {}, {"error": "x"}) if number == 3 else (200, {}, None)

    with chat_server(behave=behave) as server:
        roles = endpoint_roles(backend(server.url, retries=0, concurrency=1), CallLog())
        result = explain_and_score(latents(), roles, SETTINGS)
    missing = [each.latent for each in result.latents if each.correlation is None]
    assert missing == [0] and result.labels["a"].unscored == 1
    assert result.unfinished is None


def test_an_endpoint_that_is_down_stops_the_study_and_keeps_what_is_there(tmp_path: Path) -> None:
    def behave(number: int) -> tuple[int, dict[str, str], Any]:
        return (503, {}, {"error": "x"}) if number >= 60 else (200, {}, None)

    log = tmp_path / "calls.jsonl"
    with chat_server(behave=behave) as server:
        settings = backend(server.url, retries=0)
        roles = endpoint_roles(settings, CallLog(log))
        result = explain_and_score(latents(20), roles, SETTINGS)
        assert result.unfinished is not None and "failed, the last with" in result.unfinished
    kept = len(log.read_text().splitlines())
    assert kept == 60
    log.write_bytes(log.read_bytes()[:-30])  # and the run was killed while it wrote
    with chat_server() as server:
        roles = endpoint_roles(backend(server.url), CallLog(log))
        assert len(explain_and_score(latents(2), roles, SETTINGS).latents) == 2
    nobody = BackendSettings(llm_name="m", base_url="http://127.0.0.1:9/v1", retries=0)
    result = explain_and_score(latents(9), endpoint_roles(nobody, CallLog()), SETTINGS)
    assert result.latents == [] and "Connection error" in str(result.unfinished)
    # Fewer requests than may fail in a row: nothing that was there at first came to an end.
    result = explain_and_score(latents(1), endpoint_roles(nobody, CallLog()), SETTINGS)
    assert "127.0.0.1:9/v1 (m) is not there: " in str(result.unfinished)


def test_a_slow_endpoint_is_a_failure() -> None:
    with chat_server(delay=0.5) as server:
        endpoint = Endpoint(backend(server.url, retries=1, timeout_s=0.1), CallLog())
        assert endpoint.complete([(MESSAGES, 5)]) == [None]
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_stops_at_once(status: int) -> None:
    with chat_server(
        behave=lambda number: (status, {}, {"error": {"message": "no\x07"}})
    ) as server:
        endpoint = Endpoint(backend(server.url), CallLog())
        with pytest.raises(StudyStopped, match="refuses: .*no"):
            endpoint.complete([(MESSAGES, 5)])
        assert len(server.requests) == 1


@pytest.mark.parametrize("tokens", [50, None])
def test_the_budget_is_never_exceeded(tokens: int | None) -> None:
    with chat_server(behave=lambda number: (200, {}, completion("1", tokens))) as server:
        endpoint = Endpoint(backend(server.url, token_budget=400, concurrency=4), CallLog())
        asked = [([{"role": "user", "content": f"{i:05}"}], 40) for i in range(30)]
        with pytest.raises(StudyStopped, match="token budget of 400"):
            endpoint.complete(asked)
        most = 400 // 50 if tokens else 400 // (5 + 16 + 40)
        assert 1 <= len(server.requests) <= most
        assert endpoint.budget.used <= 400


def test_hostile_replies_stay_text(tmp_path: Path) -> None:
    def behave(number: int) -> tuple[int, dict[str, str], Any]:
        return 200, {}, completion(HOSTILE if number < 3 else "1\t99999\n2\tNaN\n999\t5\n<b>")

    with chat_server(behave=behave) as server:
        roles = endpoint_roles(backend(server.url, concurrency=1), CallLog(tmp_path / "c.jsonl"))
        result = explain_and_score(latents(), roles, SETTINGS)
    for each in result.latents:
        assert each.explanation is not None and each.explanation.isprintable()
        assert len(each.explanation) == LONGEST_EXPLANATION
        assert each.correlation is None  # too few numbers to be a simulation
    page = write_explanation_report(tmp_path, result).read_text()
    assert "&lt;script&gt;" in page and "<script" not in page


def test_how_replies_are_read() -> None:
    assert read_explanation("Sure!\nExplanation: 'the  sea'\n") == "the sea"
    assert read_explanation("seas and lakes") == "seas and lakes"
    assert read_explanation("Explanation:  ") is None
    for reply in (
        "1\t3\n2\t0\n3\t10",
        "1: 3\n2: 0\n3: 10.0",
        "**1.** 3\n2) 0\n(3) 12",
        "1 3\n2 0\n3 10",
    ):
        assert read_numbers(reply, 3, 10) == [3.0, 0.0, 10.0], reply
    assert read_numbers("1\t3\n3\t1", 4, 10) == [3.0, 0.0, 1.0, 0.0]
    assert read_numbers("1\t3", 4, 10) is None
    assert read_numbers("I cannot help with that.", 2, 10) is None


def test_the_explainer_sees_marks_and_activations() -> None:
    windows = some_windows()
    system, user = explain_messages(windows)
    assert system["role"] == "system" and "<< sea>>" in user["content"]
    assert '" sea" 10' in user["content"] and '" lake" 5' in user["content"]
    assert marked_text(windows[0], [False] * 6) == windows[0].text
    assert marked_text(windows[0], [True] * 6) == f"<<{windows[0].text}>>"


def test_the_estimate_is_near_what_is_asked() -> None:
    with chat_server() as server:
        settings = backend(server.url, price_in=1.0, price_out=2.0)
        explain_and_score(latents(5), endpoint_roles(settings, CallLog()), SETTINGS)
        sent = sum(len(m["content"]) for r in server.requests for m in r["messages"])
    cost = estimate(latents(5), SETTINGS, settings)
    # All explanations are equal here, so the null of the shuffled ones asks nothing new.
    assert 1 <= cost.requests / len(server.requests) < 1.6
    assert 0.6 < cost.tokens_in / (sent / 4) < 2
    assert cost.dollars == pytest.approx((cost.tokens_in + 2 * cost.tokens_out) / 1e6)
    assert "requests" in str(cost) and "$" in str(cost)
