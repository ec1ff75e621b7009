"""A result replaces an earlier result and no other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from jumprelu_plugin.analysis.output_file import require_place_for_file
from jumprelu_plugin.records import provenance, write_json


@pytest.mark.parametrize(
    ("name", "content", "example"),
    [
        ("cfg.json", b'{"d_in": 31}', "evaluation.json"),
        ("sae_weights.safetensors", b"\xff\x00\x81", "evaluation.json"),
        ("sae_weights.safetensors", b"\xff\x00\x81", "dashboard.html"),
        ("notes.html", b"<p>years of work", "dashboard.html"),
    ],
)
def test_a_foreign_file_is_kept(name: str, content: bytes, example: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is there and is not an earlier {example}"):
        require_place_for_file(path, example)
    assert path.read_bytes() == content


def test_an_earlier_result_gives_way(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", {"fvu": 0.1, "provenance": provenance(seed=3)})
    (tmp_path / "page.html").write_text("<!doctype html>\n<html>")
    (tmp_path / "empty.json").touch()
    for name in ("record.json", "page.html", "empty.json", "new.json"):
        require_place_for_file(tmp_path / name, f"earlier{Path(name).suffix}")
