"""A study's record, read back as what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jumprelu_plugin.studies.explain.record import read_explanation_result, write_record
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from tests.studies.explain.results import explanation_result


def test_a_record_gives_its_result_back(tmp_path: Path) -> None:
    result = explanation_result()
    path = write_record(tmp_path, result, ExplainSettings(), BackendSettings(), {})
    assert read_explanation_result(path) == result


def test_damaged_and_foreign_records_are_refused(tmp_path: Path) -> None:
    path = write_record(tmp_path, explanation_result(), ExplainSettings(), BackendSettings(), {})
    record = json.loads(path.read_text())
    record["result"]["latents"][3]["density"] = "often"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"explanations.json is not whole: result.latents.3.dens"):
        read_explanation_result(path)
    path.write_text(json.dumps({**record, "kind": "rating report"}))
    with pytest.raises(ValueError, match="kind 'rating report'; expected 'explanation study'"):
        read_explanation_result(path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="is not JSON"):
        read_explanation_result(path)
