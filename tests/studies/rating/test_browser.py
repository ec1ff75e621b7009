"""A rating session in Chromium: by keyboard, by mouse, in two tabs, with the server killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jumprelu_plugin.studies.rating.ratings import read_answers
from tests.studies.rating.studies import HOSTILE, fork_server, write_study

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="Chromium is not installed"
)


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[int]:
    """A server's port; the server is killed when the block ends."""
    child, port = fork_server(folder, port)
    try:
        yield port
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def answers(folder: Path) -> dict[str, dict[str, str]]:
    return read_answers(folder / "ratings" / "anna.jsonl").by_item


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition; playwright's own way needs the eval that the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it did not come true in 10 s: {condition}")


def saved(page: Any) -> None:
    until(page, "!localStorage.length && document.getElementById('saved').textContent === 'saved'")


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_session_by_keyboard_alone(browser: Any, tmp_path: Path, width: int, height: int) -> None:
    folder = write_study(tmp_path / "set", items=3)
    with running(folder) as port:
        context = browser.new_context(viewport={"width": width, "height": height})
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(f"http://127.0.0.1:{port}/")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#contexts p")
        # Text of the data is text: nothing of it became an element or ran.
        assert page.inner_text("#contexts p").startswith("".join(HOSTILE))
        assert page.title() == "Rating latents" and page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for rating, text in (("y", "seas"), ("n", "nothing <b>"), ("m", "y n m")):
            page.keyboard.press(rating)
            page.keyboard.press("t")
            page.keyboard.type(text)
            saved(page)
            page.keyboard.press("Enter")
        assert page.inner_text("#progress") == "All 3 rated. Thank you!"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#place") == "Latent 1 of 3"
        assert page.input_value("#text") == "seas"
        page.keyboard.press("m")  # a second thought
        saved(page)
        page.reload()
        page.wait_for_selector("#maybe[aria-pressed=true]")
        assert answers(folder) == {
            "i0": {"rating": "maybe", "text": "seas"},
            "i1": {"rating": "no", "text": "nothing <b>"},
            "i2": {"rating": "maybe", "text": "y n m"},
        }
        assert errors == []
        context.close()


def test_two_tabs_and_a_killed_server_lose_nothing(browser: Any, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "set", items=3)
    context = browser.new_context()
    with running(folder) as port:
        first, second = context.new_page(), context.new_page()
        for page in (first, second):
            page.goto(f"http://127.0.0.1:{port}/rate/anna")
            page.wait_for_selector("#contexts p")
        first.click("#yes")
        saved(first)
        second.fill("#text", "from the second tab")
        saved(second)
        assert answers(folder)["i0"] == {
            "rating": "yes", "text": "from the second tab"
        }  # fmt: skip
        second.bring_to_front()
        second.evaluate("dispatchEvent(new Event('focus'))")
        second.wait_for_selector("#yes[aria-pressed=true]")
    # The server is gone: what is rated now stays in the browser, over a closed tab too.
    second.click("#next")
    second.click("#no")
    second.wait_for_selector("#saved.waiting")
    second.close()
    with running(folder, port):
        first.wait_for_timeout(100)
        first.reload()
        until(first, "!localStorage.length")
        assert {i: a["rating"] for i, a in answers(folder).items()} == {"i0": "yes", "i1": "no"}
    context.close()


def test_enter_after_a_click_rates_no_other_latent(browser: Any, tmp_path: Path) -> None:
    folder, context = write_study(tmp_path / "set", items=3), browser.new_context()
    with running(folder) as port:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/rate/anna")
        page.wait_for_selector("#contexts p")
        page.click("#yes")
        saved(page)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.inner_text("#progress") == "1 of 3 rated"
        page.keyboard.press("N")  # as with Caps Lock
        saved(page)
        assert {i: a["rating"] for i, a in answers(folder).items()} == {"i0": "yes", "i1": "no"}
    context.close()


def test_a_browser_that_keeps_nothing(browser: Any, tmp_path: Path) -> None:
    folder, context = write_study(tmp_path / "set", items=3), browser.new_context()
    page = context.new_page()
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('blocked'); }})"
    )
    said = "document.getElementById('saved').textContent"
    posts: list[Any] = []
    page.on("request", lambda each: posts.append(each) if each.method == "POST" else None)
    with running(folder) as port:
        page.goto(f"http://127.0.0.1:{port}/rate/anna")
        page.wait_for_selector("#contexts p")
        page.click("#yes")
        until(page, f"{said} === 'saved'")
        assert answers(folder)["i0"]["rating"] == "yes"
    for _ in range(10):
        page.click("#no")
    until(page, f"{said}.includes('kept in this page alone')")
    posts.clear()
    page.wait_for_timeout(4000)
    assert 1 <= len(posts) <= 3  # one that is tried again every 1.5 s
    with running(folder, port):
        until(page, f"{said} === 'saved'")
        assert answers(folder)["i0"]["rating"] == "no"
    context.close()


def test_saved_is_said_of_what_is_saved_alone(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context()
    with running(write_study(tmp_path / "set", items=3)) as port:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/rate/anna")
        page.wait_for_selector("#contexts p")
        page.click("#yes")
        saved(page)
        held: list[Any] = []

        def hold(route: Any) -> None:
            held.append(route) if route.request.method == "POST" else route.continue_()

        page.route("**/answers/anna", hold)  # the server acknowledges nothing
        page.click("#no")
        assert page.inner_text("#saved") == "saving…"
        page.click("#next")
        assert page.inner_text("#saved") == ""
        page.click("#back")
        assert page.inner_text("#saved") == "saving…"
        while not held:
            page.wait_for_timeout(50)
        held[0].continue_()
        saved(page)
    context.close()
