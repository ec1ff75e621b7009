"""Every prompt and reply of a study, one line each: its record, and the cache of the next run."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.records import append_jsonl

CALLS_FILENAME = "calls.jsonl"


class CallLog:
    """Replies by request, in an append-only file.

    A line that a crash cut short is left out: that request is made again.

    Args:
        path: the file; None keeps replies in memory alone.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.hits = 0
        self._lock = threading.Lock()
        self._replies: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    call = json.loads(line)
                    self._replies[call["key"]] = call["reply"]
                except (ValueError, KeyError, TypeError):
                    continue

    def __len__(self) -> int:
        return len(self._replies)

    def find(self, request: Mapping[str, Any]) -> Any:
        """The reply to a request, or None."""
        with self._lock:
            found = self._replies.get(_key(request))
            self.hits += found is not None
        return found

    def add(self, request: Mapping[str, Any], reply: Any, **about: Any) -> None:
        """Store a reply, and what else is known of the call, such as its tokens."""
        key = _key(request)
        with self._lock:
            self._replies[key] = reply
            if self.path is not None:
                append_jsonl(self.path, {"key": key, "request": request, "reply": reply, **about})


def _key(request: Mapping[str, Any]) -> str:
    return digest(json.dumps(request, sort_keys=True, ensure_ascii=True))
