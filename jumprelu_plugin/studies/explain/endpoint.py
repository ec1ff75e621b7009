"""An OpenAI-compatible endpoint as explainer, simulator and judge, through the `openai` client.

The client retries what can be retried, with growing pauses or as the endpoint's Retry-After says.
This module adds what a study needs beside it: a log that answers a repeated request, a hard budget,
and an end when the endpoint is down. The key is read from the environment by the client, and is
neither logged nor recorded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.studies.explain import prompts
from jumprelu_plugin.studies.explain.calls import CallLog
from jumprelu_plugin.studies.explain.prompts import Messages
from jumprelu_plugin.studies.explain.roles import JudgeTask, Roles, SimulationTask
from jumprelu_plugin.studies.explain.settings import BackendSettings
from jumprelu_plugin.studies.sampling.texts import TextWindow
from jumprelu_plugin.studies.utf8 import as_utf8

EXPLAIN_TOKENS, LINE_TOKENS = 100, 8
MOST_FAILURES = 5  # in a row, after the client's own retries
_LONGEST_REPLY = 20_000


class StudyStopped(Exception):
    """The language model cannot go on; what was answered is kept and the study can go on later."""


class Budget:
    """Tokens that may still be used. A request reserves the most that it can take."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.used = tokens, 0
        self._reserved = 0
        self._lock = threading.Lock()

    def reserve(self, tokens: int) -> None:
        """Set tokens aside.

        Raises:
            StudyStopped: they could exceed the budget.
        """
        with self._lock:
            if self.used + self._reserved + tokens > self.tokens:
                raise StudyStopped(
                    f"the token budget of {self.tokens:,} does not allow another request "
                    f"({self.used:,} used): raise --token_budget"
                )
            self._reserved += tokens

    def settle(self, reserved: int, used: int) -> None:
        """Give back a reservation, of which `used` tokens were used."""
        with self._lock:
            self._reserved -= reserved
            self.used += used


class Endpoint:
    """A chat model behind a URL.

    Args:
        settings: the endpoint.
        log: answers repeated requests.

    Raises:
        ValueError: a setting is out of range.
        ImportError: the `studies` extra is not installed.
    """

    def __init__(self, settings: BackendSettings, log: CallLog) -> None:
        if settings.concurrency < 1 or settings.retries < 0 or settings.timeout_s <= 0:
            raise ValueError(
                f"concurrency is {settings.concurrency}, retries {settings.retries} and timeout_s "
                f"{settings.timeout_s}; give at least 1, at least 0 and more than 0"
            )
        self._openai = require_extra("openai", "studies")
        self._settings, self._log = settings, log
        self.budget = Budget(settings.token_budget)
        self._client = self._openai.OpenAI(
            base_url=settings.base_url,
            # Local servers need no key, and the client insists on one.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=settings.retries,
            timeout=settings.timeout_s,
        )
        self._failures, self._reached = 0, False
        self._stop: StudyStopped | None = None
        self._lock = threading.Lock()

    def complete(self, requests: Sequence[tuple[Messages, int]]) -> list[str | None]:
        """The replies to messages, each with its most tokens; None for a request that failed.

        Raises:
            StudyStopped: the budget is used up, nothing answers at the address, the endpoint
                refuses the key or the model, or
                `MOST_FAILURES` requests in a row failed.
        """
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            futures = [pool.submit(self._answer, *request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _answer(self, messages: Messages, most_tokens: int) -> str | None:
        request = {
            "endpoint": self._settings.base_url,
            "model": self._settings.llm_name,
            "messages": messages,
            "max_tokens": most_tokens,
            "temperature": 0.0,
        }
        found = self._log.find(request)
        if found is not None:
            return str(found)
        if self._stop is not None:  # another thread's request was the last
            raise self._stop
        try:
            return self._ask(request, messages, most_tokens)
        except StudyStopped as stop:
            self._stop = stop
            raise

    def _ask(self, request: dict[str, Any], messages: Messages, most_tokens: int) -> str | None:
        # A token is at least one byte, so this is the most that the request can take.
        bytes_sent = sum(len(message["content"].encode()) + 16 for message in messages)
        reserved = bytes_sent + most_tokens
        self.budget.reserve(reserved)
        used = reserved  # what failed may have been charged
        try:
            reply = self._client.chat.completions.create(
                model=self._settings.llm_name,
                messages=messages,
                max_tokens=most_tokens,
                temperature=0.0,
            )
            text, tokens = _read(reply)
            used = tokens or reserved
        except (self._openai.APIError, ValueError, TypeError, AttributeError, LookupError) as error:
            self._failed(error)
            return None
        finally:
            self.budget.settle(reserved, used)
        with self._lock:
            self._failures, self._reached = 0, True
        self._log.add(request, text, tokens=tokens)
        return text

    def _failed(self, error: Exception) -> None:
        openai, where = self._openai, f"{self._settings.base_url} ({self._settings.llm_name})"
        refusals = (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
            openai.BadRequestError,
        )
        if isinstance(error, refusals):
            raise StudyStopped(f"the endpoint {where} refuses: {_short(error)}") from error
        unreachable = isinstance(error, openai.APIConnectionError)
        if unreachable and not isinstance(error, openai.APITimeoutError) and not self._reached:
            raise StudyStopped(f"the endpoint {where} is not there: {_short(error)}") from error
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures >= MOST_FAILURES:
            raise StudyStopped(
                f"{failures} requests in a row to {where} failed, the last with: {_short(error)}"
            ) from error


def endpoint_roles(settings: BackendSettings, log: CallLog) -> Roles:
    """The roles played by an endpoint's chat model."""
    chat = Chat(Endpoint(settings, log).complete)
    return Roles(
        chat, chat, chat, {"kind": "endpoint", "name": settings.llm_name, "url": settings.base_url}
    )


class Chat:
    """The roles played by anything that answers chat messages.

    Args:
        complete: gives a reply, or None, to each pair of messages and most tokens.
    """

    def __init__(
        self, complete: Callable[[Sequence[tuple[Messages, int]]], list[str | None]]
    ) -> None:
        self._complete = complete

    def explain(self, tasks: Sequence[Sequence[TextWindow]]) -> list[str | None]:
        """See `Explainer`."""
        replies = self._complete([(prompts.explain_messages(t), EXPLAIN_TOKENS) for t in tasks])
        return [None if reply is None else prompts.read_explanation(reply) for reply in replies]

    def simulate(self, tasks: Sequence[SimulationTask]) -> list[list[float] | None]:
        """See `Simulator`."""
        asked = [
            (prompts.simulate_messages(t.explanation, t.pieces), LINE_TOKENS * len(t.pieces))
            for t in tasks
        ]
        return [
            None if reply is None else prompts.read_numbers(reply, len(t.pieces), prompts.SCALE)
            for t, reply in zip(tasks, self._complete(asked), strict=True)
        ]

    def judge(self, tasks: Sequence[JudgeTask]) -> list[list[float] | None]:
        """See `Judge`."""
        asked = [
            (prompts.judge_messages(t.explanation, t.texts, t.marked), LINE_TOKENS * len(t.texts))
            for t in tasks
        ]
        return [
            None if reply is None else prompts.read_numbers(reply, len(t.texts), 1.0)
            for t, reply in zip(tasks, self._complete(asked), strict=True)
        ]


def _read(reply: Any) -> tuple[str, int | None]:
    """Text and tokens of a reply; raises where it is not what the protocol says."""
    content = reply.choices[0].message.content
    if not isinstance(content, str):
        raise ValueError("the reply holds no text")
    usage = getattr(reply, "usage", None)
    total = getattr(usage, "total_tokens", None)
    tokens = total if isinstance(total, int) and total > 0 else None
    return as_utf8(content[:_LONGEST_REPLY]), tokens


def _short(error: Exception) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error)) or type(error).__name__
    return text[:300]
