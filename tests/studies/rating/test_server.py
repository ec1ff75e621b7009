"""The rating server: whom it answers, what it reads, and what is on disk when it says so."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.studies.rating.ratings import read_answers
from jumprelu_plugin.studies.rating.server import RatingServer
from tests.studies.rating.studies import HOSTILE, fork_server, write_key, write_study


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RatingServer]:
    write_key(tmp_path / "set.key.json", ["gated"] * 7)
    with RatingServer(write_study(tmp_path / "set")) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: RatingServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        sent.setdefault("Content-Type", "application/json")
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, sent)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def test_a_rating_is_on_disk_when_it_is_acknowledged(server: RatingServer) -> None:
    status, text = ask(server, "POST", "/answers/anna", {"item": "i3", "rating": "maybe"})
    assert (status, json.loads(text)) == (200, {"rating": "maybe"})
    assert read_answers(server.answers_path("anna")).rated() == {"i3": "maybe"}
    # Another tab sets the other field; neither overwrites the other's.
    ask(server, "POST", "/answers/anna", {"item": "i3", "text": "seas \u2028 <b>"})
    status, text = ask(server, "GET", "/answers/anna")
    assert json.loads(text) == {"i3": {"rating": "maybe", "text": "seas \u2028 <b>"}}
    assert json.loads(ask(server, "GET", "/answers/ben")[1]) == {}
    assert "1 of 7 rated" in ask(server, "GET", "/")[1]


def test_it_listens_on_loopback_alone(server: RatingServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for address in addresses - {"127.0.0.1", "::1"}:
        with pytest.raises(OSError):
            socket.create_connection((str(address), server.server_port), timeout=2).close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1.evil.example:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_foreign_requests_are_refused(
    server: RatingServer, headers: dict[str, str], method: str
) -> None:
    sent = {name: value.format(port=server.server_port) for name, value in headers.items()}
    body = {"item": "i1", "rating": "no"} if method == "POST" else None
    status, text = ask(server, method, "/answers/anna", body, **sent)
    assert status == 403 and "i1" not in text
    assert read_answers(server.answers_path("anna")).by_item == {}


@pytest.mark.parametrize(
    "path",
    [
        "/../set.key.json",
        "/rate/../../set.key.json",
        "/answers/..%2f..%2fset.key.json",
        "/answers/%2e%2e/%2e%2e/set.key.json",
        "//etc/passwd",
        "/answers//etc/passwd",
        "/study.json",
        "/ratings/anna.jsonl",
        "/answers/anna\\..\\ben",
        "/rate/carol",
    ],
)
def test_no_path_reads_a_file(server: RatingServer, path: str) -> None:
    status, text = ask(server, "GET", path)
    assert status == 404 and "gated" not in text and "root:" not in text
    assert ask(server, "POST", path, {"item": "i1", "rating": "no"})[0] == 404


def test_pages_never_hold_the_key(server: RatingServer) -> None:
    for path in ("/", "/rate/anna", "/answers/anna"):
        status, text = ask(server, "GET", path)
        assert status == 200 and "gated" not in text and "density" not in text


def test_token_text_is_escaped(server: RatingServer) -> None:
    text = ask(server, "GET", "/rate/anna")[1]
    assert HOSTILE[0] not in text and "<img" not in text
    data = json.loads(text.split('id="data"')[1].split(">", 1)[1].split("</script>")[0])
    assert data["items"][0]["contexts"][0]["pieces"][:3] == HOSTILE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 40_000,
        {"item": "i99", "rating": "yes"},
        {"item": "i1", "rating": "perhaps"},
        {"item": "i1"},
        {"item": ["i1"], "rating": "yes"},
        {"item": "i1", "rating": "yes", "rater": "ben"},
        {"item": "i1", "text": "x" * 4001},
        ["i1"],
    ],
)
def test_wrong_changes_are_refused(server: RatingServer, body: Any) -> None:
    status, text = ask(server, "POST", "/answers/anna", body)
    assert status == 400 and json.loads(text)["error"]
    assert not server.answers_path("anna").exists()


def test_forms_and_large_bodies_are_refused(server: RatingServer) -> None:
    change = {"item": "i1", "rating": "yes"}
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert ask(server, "POST", "/answers/anna", change, Content_Type=kind)[0] == 415
    assert ask(server, "POST", "/answers/anna", b"x" * 70_000)[0] == 413
    assert ask(server, "PUT", "/answers/anna", change)[0] == 501


@pytest.mark.parametrize("length", ["", "²", "1" * 5003, "-1", "+7", "0x7"])
def test_an_odd_content_length_is_refused(
    server: RatingServer, length: str, capfd: pytest.CaptureFixture[str]
) -> None:
    head = f"POST /answers/anna HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(head.encode("latin-1"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert capfd.readouterr().err == ""


def test_a_lone_surrogate_is_replaced(server: RatingServer) -> None:
    status, text = ask(server, "POST", "/answers/anna", {"item": "i1", "text": "\ud800 \U0001f30a"})
    assert (status, json.loads(text)) == (200, {"text": "? \U0001f30a"})
    with server.answers_path("ben").open("w") as file:  # of a server that let it through
        file.write('{"item": "i2", "text": "sea \\udfff"}\n')
    assert read_answers(server.answers_path("ben")).by_item == {"i2": {"text": "sea ?"}}


def test_a_port_in_use_is_an_error(server: RatingServer) -> None:
    with pytest.raises(OSError, match=f"port {server.server_port} .*--port"):
        RatingServer(server.folder, server.server_port)


def test_a_line_cut_short_spoils_only_itself(server: RatingServer) -> None:
    ask(server, "POST", "/answers/anna", {"item": "i1", "rating": "yes"})
    ask(server, "POST", "/answers/anna", {"item": "i2", "rating": "no"})
    path = server.answers_path("anna")
    path.write_bytes(path.read_bytes()[:-9])
    assert read_answers(path).damaged_lines == [2]
    ask(server, "POST", "/answers/anna", {"item": "i3", "rating": "no"})
    answers = read_answers(path)
    assert answers.rated() == {"i1": "yes", "i3": "no"} and answers.damaged_lines == [2]


def kill_and_check(folder: Path, kills: int) -> int:
    """Kill the server at random moments in a rating; return how many were acknowledged."""
    draw, acknowledged, total, saved = random.Random(7), {}, 0, 0
    for number in range(kills):
        child, port = fork_server(folder)
        timer = threading.Timer(draw.uniform(0.0, 0.05), os.kill, (child, signal.SIGKILL))
        # Every other time counts from the first acknowledgement, which a busy machine gives late.
        waits = number % 2 == 1
        if not waits:
            timer.start()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            while True:
                item, rating = f"i{draw.randrange(7)}", draw.choice(["yes", "maybe", "no"])
                body = json.dumps({"item": item, "rating": rating, "text": str(total)})
                connection.request("POST", "/answers/anna", body,
                                   {"Content-Type": "application/json"})  # fmt: skip
                if json.loads(connection.getresponse().read()) == {
                    "rating": rating, "text": str(total)
                }:  # fmt: skip
                    acknowledged[item] = (rating, total)
                    saved += 1
                    if waits:
                        timer.start()
                        waits = False
                total += 1
        except (OSError, http.client.HTTPException, ValueError):
            pass
        if waits:  # it never answered
            timer.start()
        timer.join()
        os.waitpid(child, 0)
        stored = read_answers(folder / "ratings" / "anna.jsonl").by_item
        for item, (rating, change) in acknowledged.items():
            # A change that was stored and not acknowledged may stand after it.
            assert int(stored[item]["text"]) >= change
            if int(stored[item]["text"]) == change:
                assert stored[item]["rating"] == rating
        total += 1  # a number is not used again after a kill
    return saved


def test_kills_lose_no_acknowledged_rating(tmp_path: Path) -> None:
    assert kill_and_check(write_study(tmp_path / "set"), 8) >= 4


@pytest.mark.slow
def test_two_hundred_kills_lose_no_acknowledged_rating(tmp_path: Path) -> None:
    saved = kill_and_check(write_study(tmp_path / "set"), 200)
    print(f"{saved} ratings were acknowledged")
    assert saved >= 100
