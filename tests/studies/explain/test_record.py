"""Explanations of a study on the page of latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jumprelu_plugin.studies.explain.record import read_explanations


def test_explanations_of_one_sae(tmp_path: Path) -> None:
    latents = [
        {"folder": str(tmp_path / "a"), "latent": 3, "explanation": "the <b>sea</b>"},
        {"folder": str(tmp_path / "a"), "latent": 4, "explanation": None},
        {"folder": str(tmp_path / "b"), "latent": 3, "explanation": "hills"},
    ]
    path = tmp_path / "explanations.json"
    path.write_text(json.dumps({"result": {"latents": latents}}))
    assert read_explanations(path, tmp_path / "b" / ".." / "a") == {3: "the <b>sea</b>"}
    with pytest.raises(ValueError, match="explains no latent of"):
        read_explanations(path, tmp_path / "c")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is no record"):
        read_explanations(path, tmp_path / "a")
    with pytest.raises(ValueError, match="is no record"):
        read_explanations(tmp_path / "none.json", tmp_path / "a")
