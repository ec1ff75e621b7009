"""Serves a rating set to browsers on this machine.

It listens on the loopback address alone. A request whose Host is not that address is refused, which
stops DNS rebinding, and so is one from a page of another origin. Paths name a rater and never a
file: only the rating set and the ratings are read, both when the server knows their names. The key
is never read.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jumprelu_plugin.studies.rating.questions import RATINGS_FOLDER, read_study
from jumprelu_plugin.studies.rating.ratings import append_change, checked_change, read_answers

LOOPBACK = "127.0.0.1"
_MOST_BYTES = 65_536
_LENGTH = re.compile(r"[0-9]{1,9}")  # int() takes other digits too, and refuses very many
_SECONDS_WITHOUT_DATA = 30


class RatingServer(ThreadingHTTPServer):
    """The server of one rating set.

    Args:
        folder: what `make_rating_study` wrote.
        port: the port; 0 for a free one, which `url` then names.

    Raises:
        ValueError: the folder holds no rating set.
        OSError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        self.folder = Path(folder)
        self.study = read_study(self.folder)
        self.lock = threading.Lock()
        (self.folder / RATINGS_FOLDER).mkdir(exist_ok=True)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise OSError(
                f"port {port} of {LOOPBACK} cannot be had ({error}): name another with --port"
            ) from error

    @property
    def url(self) -> str:
        """The address of the start page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    @cached_property
    def hosts(self) -> frozenset[str]:
        """The Host headers of requests that were meant for this server."""
        return frozenset(f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost"))

    @cached_property
    def pages(self) -> Environment:
        """The templates, with text escaped."""
        return Environment(
            loader=PackageLoader("jumprelu_plugin.studies.rating", "."),
            autoescape=True,
            undefined=StrictUndefined,
        )

    def answers_path(self, rater: str) -> Path:
        """The file of a rater of this study."""
        return self.folder / RATINGS_FOLDER / f"{rater}.jsonl"

    def progress(self) -> list[tuple[str, int, int]]:
        """Each rater's name, number of rated items and number of items."""
        return [
            (rater, len(set(items) & set(read_answers(self.answers_path(rater)).rated())),
             len(items))
            for rater, items in self.study["raters"].items()
        ]  # fmt: skip

    def save(self, rater: str, change: Any) -> dict[str, str]:
        """Store a change and return the item's answers.

        Raises:
            ValueError: it is no change of an item of this rater.
        """
        change = checked_change(change)
        if change["item"] not in self.study["raters"][rater]:
            raise ValueError("this rater has no such item")
        with self.lock:
            append_change(self.answers_path(rater), change)
        return read_answers(self.answers_path(rater)).by_item[change["item"]]


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _SECONDS_WITHOUT_DATA
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jumprelu", ""

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        place, _, rater = self.path.removeprefix("/").partition("/")
        if self.path == "/":
            self._page("start.html.j2", raters=self.server.progress(), rater=None)
        elif rater not in self.server.study["raters"] or place not in ("rate", "answers"):
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        elif place == "rate":
            items = self.server.study["raters"][rater]
            shown = [{"id": item, **self.server.study["items"][item]} for item in items]
            data = {"rater": rater, "study": self.server.study["study"], "items": shown}
            self._page("rate.html.j2", data=data, question=self.server.study["question"])
        else:
            self._json(read_answers(self.server.answers_path(rater)).by_item)

    def do_POST(self) -> None:
        self.close_connection = True  # a body that is not read must not be taken for a request
        if not self._is_ours():
            return
        place, _, rater = self.path.removeprefix("/").partition("/")
        length = self.headers.get("Content-Length", "")
        if place != "answers" or rater not in self.server.study["raters"]:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        elif not _LENGTH.fullmatch(length) or int(length) > _MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {_MOST_BYTES} bytes")
        else:
            try:
                change = json.loads(self.rfile.read(int(length)))
                answers = self.server.save(rater, change)
            except (ValueError, RecursionError) as error:
                self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            except OSError as error:
                self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, f"not saved: {error.strerror}")
            else:
                self._json(answers)

    def _is_ours(self) -> bool:
        """Whether the request was meant for this server, by Host and Origin; if not, refuse it."""
        hosts = self.headers.get_all("Host") or []
        origins = self.headers.get_all("Origin") or []
        known = self.server.hosts
        if len(hosts) != 1 or hosts[0].lower() not in known:
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers on the loopback address alone")
            return False
        if any(origin.lower() not in {f"http://{host}" for host in known} for origin in origins):
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers its own pages alone")
            return False
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers its own pages alone")
            return False
        return True

    def _page(self, template: str, **values: Any) -> None:
        nonce = secrets.token_urlsafe(16)
        text = self.server.pages.get_template(template).render(nonce=nonce, **values)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", text, policy)

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, "application/json", json.dumps(value), "default-src 'none'")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True
        self._json({"error": reason}, status)

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str) -> None:
        body = text.encode("utf-8", errors="replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""
