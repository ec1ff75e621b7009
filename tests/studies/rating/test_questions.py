"""A rating set shows nothing of the SAEs, holds what the latents do, and is dealt as asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.studies.rating.questions import _deal, make_rating_study, read_study
from jumprelu_plugin.studies.rating.settings import RatingStudySettings
from jumprelu_plugin.studies.sampling.saes import load_study_saes
from tests.studies.rating.studies import save_sae

pytestmark = pytest.mark.usefixtures("one_thread_throughout")

SETTINGS = RatingStudySettings(latents=10, contexts=4, sequences=13, raters="anna,ben,chris")


@pytest.fixture(scope="module")
def made(
    one_thread_throughout: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("study")
    first, second = save_sae(folder / "secret-a", 1), save_sae(folder / "secret-b", 2)
    return make_rating_study(
        [f"gated={first}", f"topk={second}"], folder / "set", settings=SETTINGS, context_size=32
    )


def read_key(made: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads(made[1].read_text())


def test_the_set_tells_nothing_of_the_sae(made: tuple[Path, Path]) -> None:
    text = "".join(p.read_text() for p in made[0].rglob("*") if p.is_file())
    for secret in ("gated", "topk", "secret", "density", "stratum", "latent", "tiny-gemma"):
        assert secret not in text
    assert made[1].parent == made[0].parent and made[1].name == "set.key.json"
    assert list(read_study(made[0])["items"]) == sorted(read_study(made[0])["items"])


def test_contexts_show_shares_of_the_latents_largest(made: tuple[Path, Path]) -> None:
    study, key = read_study(made[0]), read_key(made)
    assert set(study["items"]) == set(key["items"]) and len(key["items"]) == 20
    assert {each["label"] for each in key["items"].values()} == {"gated", "topk"}
    assert all(each["latent"] != 5 and each["density"] > 0 for each in key["items"].values())
    assert {each["stratum"] for each in key["items"].values()} == {0, 1, 2, 3}
    for item in study["items"].values():
        assert 1 <= len(item["contexts"]) <= 4
        assert max(max(context["shares"]) for context in item["contexts"]) == 1.0
        for context in item["contexts"]:
            assert len(context["pieces"]) == len(context["shares"])
            assert max(context["shares"]) >= 0 and "<bos>" not in context["pieces"]


def test_raters_share_the_overlap_and_divide_the_rest(made: tuple[Path, Path]) -> None:
    deal = read_study(made[0])["raters"]
    assert list(deal) == ["anna", "ben", "chris"]
    sets = [set(items) for items in deal.values()]
    assert len(set.intersection(*sets)) == 6  # 0.3 of 20
    assert set.union(*sets) == set(read_study(made[0])["items"])
    assert sorted(map(len, sets)) == [10, 11, 11]
    assert len({tuple(i for i in items if i in set.intersection(*sets))
                for items in deal.values()}) > 1  # fmt: skip


def test_the_order_of_the_saes_says_nothing_of_who_rates_what_when(
    made: tuple[Path, Path],
) -> None:
    names = list(read_key(made)["items"])  # one SAE's after another's, by density
    deal = _deal(names, SETTINGS.rater_names(), SETTINGS)
    assert deal == _deal(names[::-1], SETTINGS.rater_names(), SETTINGS)
    assert deal == read_study(made[0])["raters"]


def test_fewer_latents_than_were_asked_for_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    saved = save_sae(tmp_path / "sae", 1)
    settings = RatingStudySettings(latents=10_000, contexts=2, sequences=5, raters="anna")
    made = make_rating_study(
        [f"a={saved}"], tmp_path / "set", settings=settings, context_size=32, log=said.append
    )
    count = len(read_study(made[0])["items"])
    assert f"a: {count} latents of 10000, all that fire" in said


def test_every_rater_has_items(tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae", 1)

    def make(**changes: Any) -> dict[str, list[str]]:
        settings = replace(RatingStudySettings(contexts=2, sequences=5), **changes)
        made = make_rating_study([saved], tmp_path / "set", settings=settings, context_size=32)
        return read_study(made[0])["raters"]

    with pytest.raises(ValueError, match="give more of them, fewer raters or a larger overlap"):
        make(latents=100, raters="59", overlap=0.0)  # of 43 latents some never fire
    assert not (tmp_path / "set").exists()
    assert {len(items) for items in make(latents=1, raters="5", overlap=1.0).values()} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raters", "a b"], "raters is 'a b'"),
        (["--raters", "0"], "raters is '0'"),
        (["--overlap", "1.5"], "overlap is 1.5"),
        (["--contexts", "1"], "contexts is 1"),
        (["--latents", "0"], "latents is 0 and strata 4; give at least 1 and 1"),
        (["--strata", "0"], "latents is 20 and strata 0; give at least 1 and 1"),
        (["--latents", "1"], "1 are too few latents for 5 raters"),
        (["--key_path", "set/key.json"], "which raters are given"),
    ],
)
def test_wrong_settings_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["study", "make", "x", "--output_path", "set", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_foreign_saes_are_refused(tmp_path: Path) -> None:
    good = save_sae(tmp_path / "good", 1)
    other = save_sae(tmp_path / "other", 1, model="another-model")
    narrow = save_sae(tmp_path / "narrow", 1, d_in=31)
    broken = save_sae(tmp_path / "broken", 1)
    (broken / "cfg.json").write_text('{"d_in": 2')
    for folders, message in (
        ([good, other], "reads a model with model_name 'another-model'"),
        ([narrow], "of another model"),
        ([good, tmp_path / "none"], "holds no dictionary"),
        ([broken], "cfg.json"),
        ([], "no SAE was given"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rating_study(folders, tmp_path / "set")
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob("*.key.json"))


def test_saes_of_a_model_loaded_in_two_ways_are_refused(tmp_path: Path) -> None:
    good, other = save_sae(tmp_path / "good", 1), save_sae(tmp_path / "other", 1)
    with_metadata(other, model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(ValueError, match=r"model_from_pretrained_kwargs \{'center_writing_we"):
        load_study_saes([good, other])


def test_saes_of_different_text_are_refused_unless_the_options_say_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("one", "two", "three")
    first, second, third = (save_sae(tmp_path / name, 1) for name in names)
    with_metadata(first, context_size=64, dataset_path="texts")
    with_metadata(second, context_size=64, dataset_path="texts")
    with_metadata(third, context_size=512, prepend_bos=False, sequence_separator_token="eos")
    with pytest.raises(ValueError, match="text of different kinds") as refused:
        load_study_saes([first, second, f"b={third}"])
    message = str(refused.value)
    assert f"context_size is 64 for {first}, {second} and 512 for {third}" in message
    assert f"dataset_path is 'texts' for {first}, {second} and '' for {third}" in message
    assert "with --dataset_path and --context_size" in message
    options = ModelOptions(dataset_path="")
    with pytest.raises(ValueError, match="for all with --context_size$"):
        load_study_saes([first, third], options)
    with pytest.raises(ValueError, match="for all with --dataset_path$"):
        load_study_saes([first, third], context_size=32)
    assert "prepend_bos" not in caplog.text
    for sae in load_study_saes([first, third], options, context_size=32):
        assert sae.saved.choice.context_size == 32 and sae.saved.choice.prepend_bos
    (warning,) = [each for each in caplog.messages if "different kinds" in each]
    assert f"prepend_bos is True for {first} and False for {third}" in warning
    assert f"All are read as {first} was" in warning and "separator" not in warning
    load_study_saes([third, first], ModelOptions(dataset_path="texts"), context_size=32)
    assert "sequence_separator_token is 'eos' for" in caplog.messages[-1]


def test_an_unrecorded_context_size_is_the_default_one(tmp_path: Path) -> None:
    silent, other = save_sae(tmp_path / "silent", 1), save_sae(tmp_path / "other", 2)
    with_metadata(other, context_size=128)
    assert len(load_study_saes([silent, other])) == 2
    with_metadata(other, context_size=127)
    with pytest.raises(ValueError, match="context_size is 128 for .*silent and 127 for .*other"):
        load_study_saes([silent, other])


def test_a_folder_with_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "lr=0.01" / "sae", 1)
    other = save_sae(tmp_path / "lr=0.02" / "sae", 2)
    (alone,) = load_study_saes([folder])
    assert (alone.label, alone.saved.folder) == ("sae", folder)
    found = load_study_saes([f"a={folder}", str(other)])
    assert [(sae.label, sae.saved.folder) for sae in found] == [("a", folder), ("sae", other)]


def with_metadata(folder: Path, **values: Any) -> None:
    """Change what an SAE's folder says of its training."""
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"].update(values)
    (folder / "cfg.json").write_text(json.dumps(config))


def test_the_hook_that_is_given_is_read(tmp_path: Path) -> None:
    """And not the one that the SAE's metadata names."""
    sae = save_sae(tmp_path / "sae", 1)
    (found,) = load_study_saes([sae], ModelOptions(hook_name="blocks.0.hook_resid_pre"))
    assert found.saved.dictionary.cfg.metadata.hook_name == "blocks.0.hook_resid_pre"
    with pytest.raises(ValueError, match="blocks.0.hook_mlp_in.*does not fire.*use_hook_mlp_in"):
        load_study_saes([sae], ModelOptions(hook_name="blocks.0.hook_mlp_in"))
