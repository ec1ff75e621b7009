"""The commands, on SAEs of the embedded model and a chat server on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.studies.explain import latents
from tests.studies.explain.chat_server import chat_server
from tests.studies.rating.studies import save_sae

pytestmark = pytest.mark.usefixtures("loaded_once")
FEW = ["--sequences", "14", "--context_size", "32", "--llm_name", "m"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def said(done: Any) -> str:
    """The output on one line, without the box around an error."""
    return " ".join(done.output.replace("│", " ").split())


def test_a_study_of_two_saes(tmp_path: Path) -> None:
    first, second = save_sae(tmp_path / "one", 1), save_sae(tmp_path / "two", 2)
    output = tmp_path / "study"
    command = ["study", "explain", f"gated={first}", f"topk={second}", "--output_path", str(output),
               "--latents", "5", "--contexts", "4", "--scored_contexts", "3", *FEW]  # fmt: skip

    def behave(number: int) -> tuple[int, dict[str, str], Any]:
        return (401, {}, {"error": "no"}) if number >= 4 else (200, {}, None)

    with chat_server(behave=behave) as server:
        url = ["--base_url", server.url]
        done = run(*command, *url)  # the question is not answered
        assert done.exit_code != 0 and server.requests == [] and "about" in done.output
        done = run(*command, *url, "--yes")
        assert done.exit_code == 2 and "refuses" in done.output
        assert "same command goes on" in said(done)
        kept = len((output / "calls.jsonl").read_text().splitlines())
        assert kept == 4
        server.behave = lambda number: (200, {}, None)
        done = run(*command, *url, "--yes")
        assert done.exit_code == 0, done.output
    record = json.loads((output / "explanations.json").read_text())
    assert set(record["result"]["labels"]) == {"gated", "topk"}
    assert len(record["result"]["latents"]) == 10 and record["result"]["unfinished"] is None
    assert record["backend"]["base_url"] == url[1] and record["provenance"]["data_digest"]
    assert {each["explanation"] for each in record["result"]["latents"]} == {"the sea"}
    assert (output / "explanations.html").read_text().count("<svg") == 4
    calls = (output / "calls.jsonl").read_bytes()
    again = run(*command, *url, "--yes")  # the server is gone
    assert again.exit_code == 0, again.output
    assert (output / "calls.jsonl").read_bytes() == calls
    after = json.loads((output / "explanations.json").read_text())
    assert after["result"] == record["result"]


def test_a_study_that_stops_replaces_nothing_that_came_further(tmp_path: Path) -> None:
    output = tmp_path / "study"
    command = ["study", "explain", str(save_sae(tmp_path / "sae", 1)), "--output_path", str(output),
               "--yes", "--contexts", "4", "--scored_contexts", "3", *FEW]  # fmt: skip
    record, page = output / "explanations.json", output / "explanations.html"

    def refuse(number: int) -> tuple[int, dict[str, str], Any]:
        return 401, {}, {"error": "no"}

    with chat_server(behave=refuse) as server:
        url = ["--base_url", server.url]
        assert run(*command, *url, "--latents", "5").exit_code == 2
        assert json.loads(record.read_text())["result"]["latents"] == []
        assert "This study is not finished" in page.read_text()
        server.behave = lambda number: (200, {}, None)
        assert run(*command, *url, "--latents", "5").exit_code == 0
    whole = record.read_bytes(), page.read_bytes()
    assert len(json.loads(whole[0])["result"]["latents"]) == 5
    stopped = run(*command, *url, "--latents", "7")  # the server is gone
    assert stopped.exit_code == 2 and "the same command goes on" in said(stopped)
    assert "they hold 5 latents of an earlier run" in said(stopped)
    assert (record.read_bytes(), page.read_bytes()) == whole
    record.write_text("{")  # nothing can be read of it
    assert run(*command, *url, "--latents", "7").exit_code == 2
    assert json.loads(record.read_text())["result"]["unfinished"]
    assert "This study is not finished" in page.read_text()


def test_one_latent(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", 1)
    with chat_server() as server:
        arguments = ["explain", str(folder), *FEW, "--base_url", server.url]
        done = run(*arguments, "--latent", "3")
        assert done.exit_code == 0, done.output
        assert "explanation by m: the sea" in done.output and "<<" in done.output
        assert run(*arguments, "--latent", "5").exit_code == 2  # never fires
        assert "0 to 42" in run(*arguments, "--latent", "43").output


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run("study", "explain", "x", "--output_path", str(tmp_path), "--base_url", "http://x/v1")
    assert done.exit_code == 2 and "holds no earlier study" in said(done)
    done = run("study", "explain", "x", "--output_path", str(tmp_path / "n"), "--contexts", "1")
    assert done.exit_code == 2 and "contexts is 1" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--latents", "0", "latents is 0 and strata 4; give at least 1 and 1"),
        ("--strata", "0", "latents is 100 and strata 0; give at least 1 and 1"),
        ("--seed", "-1", "seed is -1; give a number from 0"),
    ],
)
def test_wrong_settings_are_refused_first(
    flag: str, value: str, message: str, tmp_path: Path
) -> None:
    output = ["--output_path", str(tmp_path / "out"), "--base_url", "http://x/v1"]
    done = run("study", "explain", "no-such-folder", *output, flag, value)
    assert done.exit_code == 2 and message in said(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["scipy.stats", "statsmodels.stats.multitest", "matplotlib"])
def test_a_missing_package_is_named_first(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by the statistics, after all latents are scored."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    commands = [["study", "explain", "no-such-folder", "--output_path", str(tmp_path / "out")]]
    if package == "scipy.stats":
        commands.append(["explain", "no-such-folder", "--latent", "3"])
    for command in commands:
        done = run(*command)
        name = package.partition(".")[0]
        assert done.exit_code == 2, done.output
        assert f"{name} is not installed: pip install 'jumprelu-plugin[studies]'" in said(done)


def test_one_latent_is_refused_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_sae(tmp_path / "sae", 1)
    monkeypatch.setattr(latents, "collect_top_activations", lambda *_, **__: pytest.fail("read"))
    arguments = ["explain", str(folder), *FEW, "--latent"]
    done = run(*arguments, "43", "--base_url", "http://x/v1")
    assert done.exit_code == 2 and "the dictionary has latents 0 to 42" in said(done)
    done = run(*arguments, "3", "--llm_dtype", "float99")
    assert done.exit_code == 2 and "llm_dtype is 'float99'" in said(done)
