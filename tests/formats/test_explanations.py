"""Explanations of a study, read for one SAE, and exported as Neuronpedia's package reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from neuronpedia.np_explanation import Explanation

from jumprelu_plugin import export
from jumprelu_plugin.formats.explanations import read_explanations
from tests.dictionaries import random_sae, saved


def write_study(path: Path, *latents: tuple[Path, int, str | None]) -> Path:
    found = [{"folder": str(f), "latent": i, "explanation": text} for f, i, text in latents]
    path.write_text(json.dumps({"result": {"latents": found, "backend": {"name": "m"}}}))
    return path


def test_explanations_of_one_sae(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    path = write_study(
        tmp_path / "explanations.json", (a, 3, "the <b>sea</b>"), (a, 4, None), (b, 3, "hills")
    )
    found = read_explanations(path, b / ".." / "a")
    assert found.texts == {3: "the <b>sea</b>"} and found.model == "m"
    with pytest.raises(ValueError, match="explains no latent of"):
        read_explanations(path, tmp_path / "c")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is no record"):
        read_explanations(path, a)
    with pytest.raises(ValueError, match="is no record"):
        read_explanations(tmp_path / "none.json", a)


def test_neuronpedia_reads_them(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    study = write_study(
        tmp_path / "explanations.json",
        (folder, 61, "seas,\n“lakes” and 湖"),
        (folder, 7, "hills"),
        (tmp_path / "other", 8, "not this one"),
    )
    export(folder, "neuronpedia", tmp_path / "out", unchecked=True, explanations=study)
    lines = (tmp_path / "out" / "explanations" / "batch-0.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    source = "2-hook_resid_post-67"
    assert [Explanation.from_np_db_json(row) for row in rows] == [
        Explanation("gemma-2-2b", source, 7, "hills", "jumprelu_study-explain", "m"),
        Explanation(
            "gemma-2-2b", source, 61, "seas,\n“lakes” and 湖", "jumprelu_study-explain", "m"
        ),
    ]
    # As its exports on the web name them.
    assert all(row["layer"] == source and isinstance(row["index"], str) for row in rows)


def test_explanations_of_another_sae_are_refused(tmp_path: Path) -> None:
    folder = saved(random_sae(), tmp_path / "sae")
    study = write_study(tmp_path / "explanations.json", (folder, 67, "one too far"))
    with pytest.raises(ValueError, match=r"latents \[67\] are explained; .* 0 to 66"):
        export(folder, "neuronpedia", tmp_path / "out", unchecked=True, explanations=study)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--explanations: not an option of --to saelens"):
        export(folder, "saelens", tmp_path / "out", explanations=study)
