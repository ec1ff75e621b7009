from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from jumprelu_plugin import records
from jumprelu_plugin.records import (
    append_jsonl,
    provenance,
    whole_files,
    whole_folder,
    write_json,
)


def test_write_json_round_trips_and_makes_parents(tmp_path):
    @dataclass
    class Run:
        name: str
        folder: Path
        losses: torch.Tensor

    path = tmp_path / "a" / "b" / "run.json"
    record = {
        "run": Run("σ", Path("x/y"), torch.tensor([1.5, 2.25])),
        "count": np.int64(7),
        "share": np.float32(0.5),
        "nothing": None,
        3: [True, (1, 2)],
    }
    assert write_json(path, record) == path
    assert json.loads(path.read_text()) == {
        "run": {"name": "σ", "folder": "x/y", "losses": [1.5, 2.25]},
        "count": 7,
        "share": 0.5,
        "nothing": None,
        "3": [True, [1, 2]],
    }
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_json_cannot_hold_name_their_key_and_leave_the_old_file(tmp_path, bad):
    path = write_json(tmp_path / "r.json", {"kept": 1})
    with pytest.raises(ValueError, match=r"result\.parts\[1\]\.fvu is (nan|-?inf)"):
        write_json(path, {"result": {"parts": [{}, {"fvu": bad}]}})
    with pytest.raises(ValueError, match=r"losses\[0\]"):
        write_json(path, {"losses": torch.tensor([bad])})
    with pytest.raises(TypeError, match="sae is a object"):
        write_json(path, {"sae": object()})
    with pytest.raises(TypeError, match="JSON keys are text"):
        write_json(path, {(1, 2): 0})
    assert json.loads(path.read_text()) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write_json(tmp_path / "r.json", {"kept": 1})

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(records.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_a_reader_of_the_old_file_never_sees_half_of_the_new(tmp_path):
    path = write_json(tmp_path / "r.json", {"kept": 1})
    with path.open() as reader:
        write_json(path, {"new": 2})
        assert json.load(reader) == {"kept": 1}
    assert json.loads(path.read_text()) == {"new": 2}


def test_append_jsonl_adds_lines_and_survives_a_torn_one(tmp_path):
    path = tmp_path / "logs" / "steps.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2, "name": "λ"})
    with path.open("a") as file:
        file.write('{"step": 3, "na')  # a writer that died
    append_jsonl(path, {"step": 4})
    with pytest.raises(ValueError, match="loss is nan"):
        append_jsonl(path, {"loss": float("nan")})
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert [json.loads(lines[i]) for i in (0, 1, 3)] == [
        {"step": 1},
        {"step": 2, "name": "λ"},
        {"step": 4},
    ]


def test_provenance_says_what_ran_and_is_strict_json(tmp_path):
    record = provenance(seed=17, model_digest="abc", data_digest="def")
    assert (record["seed"], record["model_digest"], record["data_digest"]) == (17, "abc", "def")
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"sae-lens", "transformer-lens", "transformers"} <= record["versions"].keys()
    assert record["hardware"]["threads"] == torch.get_num_threads()
    when = datetime.fromisoformat(record["time_utc"])
    assert when.utcoffset() == timedelta(0)
    assert json.loads(write_json(tmp_path / "p.json", record).read_text()) == record


def test_git_commit_is_of_the_repository_that_tracks_the_file(tmp_path):
    def git(*arguments):
        identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
                    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}  # fmt: skip
        done = subprocess.run(["git", "-c", "commit.gpgsign=false", *arguments], cwd=tmp_path,
                              check=True, capture_output=True, text=True,
                              env={**os.environ, **identity})  # fmt: skip
        return done.stdout.strip()

    tracked, stranger = tmp_path / "tracked.py", tmp_path / "stranger.py"
    tracked.write_text("1")
    stranger.write_text("1")
    assert records._git(tracked) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "--no-verify", "-m", "one")
    assert records._git(tracked) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    tracked.write_text("2")
    assert records._git(tracked) == {"commit": git("rev-parse", "HEAD"), "modified": True}
    assert records._git(stranger) is None


def _entries(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_whole_folder_appears_at_the_end_of_the_block(tmp_path):
    place = tmp_path / "a" / "b"
    with whole_folder(place) as folder:
        (folder / "x.txt").write_text("x")
        assert not place.exists()
        assert folder.name == place.name
    assert _entries(tmp_path) == {"a/b/x.txt": "x"}
    assert os.listdir(place.parent) == ["b"]


@pytest.mark.parametrize("replaces", [True, lambda folder: (folder / "old.txt").is_file()])
def test_a_whole_folder_replaces_an_earlier_one_and_only_when_it_is_whole(tmp_path, replaces):
    place = tmp_path / "run"
    place.mkdir()
    (place / "old.txt").write_text("old")
    with (
        pytest.raises(RuntimeError, match="half-way"),
        whole_folder(place, replaces=replaces) as folder,
    ):
        (folder / "new.txt").write_text("new")
        raise RuntimeError("half-way")
    assert _entries(tmp_path) == {"run/old.txt": "old"}
    with whole_folder(place, replaces=replaces) as folder:
        (folder / "new.txt").write_text("new")
    assert _entries(tmp_path) == {"run/new.txt": "new"}
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("replaces", [False, lambda folder: (folder / "old.txt").is_file()])
def test_a_whole_folder_never_replaces_a_foreign_one(tmp_path, replaces):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(ValueError, match="is not an earlier export"),
        whole_folder(tmp_path / "mine", replaces=replaces, kind="export"),
    ):
        raise AssertionError("the block was entered")
    with (
        pytest.raises(ValueError, match="is a file"),
        whole_folder(tmp_path / "mine" / "thesis.txt", replaces=replaces),
    ):
        raise AssertionError("the block was entered")
    assert _entries(tmp_path) == {"mine/thesis.txt": "years of work"}
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty", replaces=replaces):
        pass
    assert sorted(os.listdir(tmp_path)) == ["empty", "mine"]


def test_a_whole_folder_in_place_of_a_link_fills_what_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "x.txt").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "x.txt").read_text() == "x"


def test_the_working_directory_is_filled_where_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (Path(), tmp_path):
        with whole_folder(given) as folder:
            (folder / "x.txt").write_text("x")
        assert os.listdir() == ["x.txt"]  # the directory that the process is in, not another
        with (
            pytest.raises(ValueError, match="neither a working directory"),
            whole_folder(given, replaces=True),
        ):
            raise AssertionError("the block was entered")
        (tmp_path / "x.txt").unlink()


def test_text_goes_through_links_and_into_pipes(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    records.write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        records.write_text(tmp_path / "pipe", "through")
        assert read.result() == "through"
    assert (tmp_path / "pipe").is_fifo()


def test_whole_files_join_what_is_there_and_the_last_one_tells_that_all_are(tmp_path, monkeypatch):
    (tmp_path / "layer_0").mkdir()
    (tmp_path / "layer_0" / "old").write_text("old")
    (tmp_path / "metrics.jsonl").write_text("kept")
    (tmp_path / ".unfinished").mkdir()  # of a process that was killed
    (tmp_path / ".unfinished" / "stale").write_text("stale")
    order = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, to: order.append(path.name) or replace(path, to)
    )
    with whole_files(tmp_path, last="a.json") as folder:
        for name in ("a.json", "b.json", "layer_0/new"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
    assert order == ["b.json", "layer_0", "a.json"]
    whole = {
        "metrics.jsonl": "kept",
        **{name: name for name in ("a.json", "b.json", "layer_0/new")},
    }
    assert _entries(tmp_path) == whole
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path) as folder:
        (folder / "b.json").write_text("half")
        raise KeyboardInterrupt
    assert _entries(tmp_path) == whole
    assert ".unfinished" not in os.listdir(tmp_path)
