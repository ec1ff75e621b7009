"""The main job: what it writes, that it can be repeated and interrupted, and what it reaches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from sae_lens import SAE

from jumprelu_plugin.studies import demo
from jumprelu_plugin.studies.demo import DemoSettings, run_demo

QUICK = DemoSettings(
    d_sae=257, target_l0=13.0, steps=13, train_batch_size_tokens=512, evaluation_sequences=17
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, tokenized_once: None) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "result"
    console = Console(record=True, width=100)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does in a command
        run_demo(output, QUICK, console)
    assert [str(warning.message) for warning in warned if "sae_lens" in warning.filename] == []
    return output, console.export_text()


def test_it_leaves_an_sae_a_record_and_metrics(quick: tuple[Path, str]) -> None:
    output, said = quick
    assert {path.name for path in output.iterdir()} == {"sae", "demo.json", "metrics.jsonl"}
    assert SAE.load_from_disk(output / "sae").cfg.architecture() == "jumprelu"
    record = json.loads((output / "demo.json").read_text())
    assert record["settings"]["d_sae"] == 257
    assert len(record["clearest_latents"]) == len(set(record["clearest_latents"])) <= 10
    assert record["provenance"]["versions"]["torch"] and record["provenance"]["model_digest"]
    assert f"jumprelu steer {output / 'sae'}" in said.replace("\n", "")


@pytest.mark.slow
def test_it_can_be_repeated(quick: tuple[Path, str]) -> None:
    output, _ = quick
    before = json.loads((output / "demo.json").read_text())
    run_demo(output, QUICK, Console(quiet=True))
    after = json.loads((output / "demo.json").read_text())
    assert list(output.parent.iterdir()) == [output]
    assert after["provenance"]["time_utc"] >= before["provenance"]["time_utc"]
    assert after["evaluation"].keys() == before["evaluation"].keys()


def test_interrupted_it_leaves_the_earlier_result_alone(
    quick: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = quick
    before = (output / "demo.json").read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(output, QUICK, Console(quiet=True))
    assert (output / "demo.json").read_bytes() == before
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.slow
def test_it_reaches_what_the_readme_says(tmp_path: Path) -> None:
    """With a seed that nothing was tuned on."""
    run_demo(tmp_path / "demo", DemoSettings(seed=11), Console(quiet=True))
    record = json.loads((tmp_path / "demo" / "demo.json").read_text())
    found = record["evaluation"]
    assert found["fvu"] < 0.25
    assert found["l0"] <= 40
    assert found["dead_share"] < 0.05
    assert found["delta_loss"] <= 0.1 * (found["loss_mean_ablated"] - found["loss_clean"])
    steering = record["steering"]
    # By how much depends on the latent: 3 times with this seed once, 200 times with seed 0.
    assert steering["probability_after"] > steering["probability_before"]
    assert steering["text_after"] != steering["text_before"]
