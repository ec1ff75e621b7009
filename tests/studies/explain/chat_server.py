"""A local HTTP server that speaks the chat protocol, well or badly."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOSTILE = "Explanation: <script>alert(1)</script>\x00\x1b[31m seas \ud800 " + "x" * 900


def good_reply(messages: list[dict[str, str]]) -> str:
    """A model that knows the sea: what a good chat model would answer."""
    system, user = messages[0]["content"], messages[1]["content"]
    if "Answer with one short" in system:
        return "Explanation: the sea"
    if "numbered token" in system:
        tokens = user.split("Tokens:\n")[1].split("\n")
        return "\n".join(f"{i}\t{9 * (' sea' in t)}" for i, t in enumerate(tokens, start=1))
    texts = re.split(r"Text \d+: ", user)[1:]
    word = "<< sea>>" if "<<" in system else " sea"
    return "\n".join(f"{i}: {int(word in text)}" for i, text in enumerate(texts, start=1))


@dataclass
class ChatServer:
    """What the server was asked, and how it answers.

    Attributes:
        behave: from the number of the request to a status, headers and a body; a body of None is
            what a good model answers.
        requests: bodies of all requests.
        keys: their Authorization headers.
        most_at_once: the most requests in progress at a time.
    """

    behave: Callable[[int], tuple[int, dict[str, str], Any]] = lambda number: (200, {}, None)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    delay: float = 0.0


def completion(text: Any, tokens: int | None = 50) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return body if tokens is None else {**body, "usage": usage}


@contextmanager
def chat_server(**how: Any) -> Iterator[ChatServer]:
    state, lock, active = ChatServer(**how), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.requests)
                state.requests.append(body)
                state.keys.append(self.headers["Authorization"])
                active[0] += 1
                state.most_at_once = max(state.most_at_once, active[0])
            time.sleep(state.delay)
            status, headers, reply = state.behave(number)
            if reply is None:
                reply = completion(good_reply(body["messages"]))
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            with lock:
                active[0] -= 1
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client waited no longer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield state
        server.shutdown()
