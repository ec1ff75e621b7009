"""The unblinded report: shares, agreement and comparisons against published and closed forms."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from scipy import stats
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.studies.comparison import Group, compare_groups, comparison_table
from jumprelu_plugin.studies.rating.agreement import RatedLatent, label_ratings, rater_agreement
from jumprelu_plugin.studies.rating.ratings import append_change
from jumprelu_plugin.studies.rating.report import unblind
from tests.studies.rating.studies import write_key, write_study


def test_shares_are_over_latents_with_wilsons_interval() -> None:
    latents = [
        RatedLatent("a", 0.1, {"x": "yes", "y": "no"}),
        *(RatedLatent("a", 0.02, {"x": "yes"}) for _ in range(5)),
        RatedLatent("a", 0.5, {"z": "no"}),
    ]
    found = label_ratings(latents)
    assert (found.latents, found.ratings) == (7, 8)
    share, n, z = 5.5 / 7, 7, stats.norm.ppf(0.975)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    yes = found.shares["yes"]
    assert (yes.share, yes.low, yes.high) == pytest.approx((share, center - half, center + half))
    assert found.shares["maybe"].share == 0
    assert found.shares["maybe"].low == pytest.approx(0, abs=1e-15)
    assert found.weighted_shares["yes"] == pytest.approx((0.05 + 0.1) / 0.7)
    assert found.mean_points == pytest.approx(5.5 / 7)


def test_alpha_is_krippendorffs() -> None:
    """For two raters and complete data the ordinal alpha has a closed form of its own."""
    pairs = [("yes", "yes")] * 5 + [("no", "no")] * 3 + [("yes", "no")] * 2 + [("maybe", "yes")]
    latents = [RatedLatent("a", 0.1, {"x": a, "y": b}) for a, b in pairs]
    latents.append(RatedLatent("a", 0.1, {"x": "maybe"}))  # one rating: not counted
    found = rater_agreement(latents)
    values = [v for pair in pairs for v in pair]
    count = {v: values.count(v) for v in ("no", "maybe", "yes")}

    def nominal(a: str, b: str) -> float:
        return float(a != b)

    def ordinal(a: str, b: str) -> float:
        order = ["no", "maybe", "yes"]
        low, high = sorted((order.index(a), order.index(b)))
        between = sum(count[v] for v in order[low : high + 1])
        return (between - (count[a] + count[b]) / 2) ** 2

    n = len(values)
    for metric, alpha in ((nominal, found.alpha_nominal), (ordinal, found.alpha_ordinal)):
        observed = sum(2 * metric(a, b) for a, b in pairs) / n
        expected = sum(count[a] * count[b] * metric(a, b) for a in count for b in count) / (
            n * (n - 1)
        )
        assert alpha == pytest.approx(1 - observed / expected)
    assert found.latents == 11
    assert rater_agreement(latents[-1:]).why_none == "no latent has two ratings"
    same = [RatedLatent("a", 0.1, {"x": "yes", "y": "yes"})] * 3
    assert rater_agreement(same).alpha_ordinal is None


def test_groups_are_compared_by_odds_and_ranks() -> None:
    def group(yes: int, no: int) -> Group:
        scores = [1.0] * yes + [0.0] * no
        return Group(scores, [s > 0.5 for s in scores], [0.01 * i for i in range(yes + no)])

    (found,) = compare_groups({"a": group(17, 6), "b": group(5, 14), "none": group(0, 0)})
    assert (found.first, found.second, found.pairs) == ("a", "b", 19)
    assert found.p_odds == pytest.approx(stats.fisher_exact([[17, 6], [5, 14]]).pvalue)
    assert found.odds_ratio == pytest.approx(7.5, rel=0.1)  # 17·14 / (6·5) = 7.9 unconditionally
    low, high = found.odds_ratio_interval
    assert low is not None and high is not None and 1 < low < 7.5 < high
    assert found.difference == pytest.approx(17 / 23 - 5 / 19)
    three = compare_groups({"a": group(17, 6), "b": group(5, 14), "c": group(17, 6)})
    assert [each.p_odds for each in three] == pytest.approx(
        [3 * found.p_odds, 1.0, 3 * found.p_odds], rel=0.51
    )


def test_an_infinite_odds_ratio_is_told_from_none() -> None:
    def group(yes: int, no: int) -> Group:
        scores = [1.0] * yes + [0.0] * no
        return Group(scores, [s > 0.5 for s in scores], [0.01] * len(scores))

    groups = {"all": group(7, 0), "none": group(0, 5), "as well": group(0, 11), "some": group(3, 8)}
    rows = comparison_table(compare_groups(groups)).rows
    shown = {row[0]: row[2] for row in rows}
    assert re.fullmatch(r"∞ \[\d+\.\d\d, ∞\]", shown["all − none"])
    assert shown["none − as well"] == "not defined"
    assert re.fullmatch(r"0\.00 \[0\.00, \d+\.\d\d\]", shown["none − some"])


def rate(folder: Path, rater: str, answers: str) -> None:
    for number, answer in enumerate(answers):
        rating = {"y": "yes", "m": "maybe", "n": "no"}.get(answer)
        if rating:
            change = {"item": f"i{number}", "rating": rating, "text": f"<i>{rater} {number}</i>"}
            append_change(folder / "ratings" / f"{rater}.jsonl", change)


def test_report_command(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "set")
    write_key(tmp_path / "set.key.json", ["gated"] * 3 + ["topk"] * 4)
    rate(folder, "anna", "yyynnm-")
    rate(folder, "ben", "yymnn-n")
    with (folder / "ratings" / "ben.jsonl").open("ab") as file:
        file.write(b'{"item": "i4", "text": "sea \\ud800"}\n{"item": "i5", "rati')
    (folder / "ratings" / "stranger.jsonl").write_text("{}")
    done = CliRunner().invoke(app, ["study", "report", str(folder)])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "set-report" / "ratings.json").read_text())["result"]
    assert record["labels"]["gated"]["shares"]["yes"]["share"] == pytest.approx(2.5 / 3)
    assert record["labels"]["topk"]["ratings"] == 6
    assert record["progress"] == {"anna": [6, 7], "ben": [6, 7]}
    assert len(record["warnings"]) == 2 and "ben.jsonl" in record["warnings"][0]
    assert record["latents"][2]["ratings"] == {"anna": "yes", "ben": "maybe"}
    page = (tmp_path / "set-report" / "ratings.html").read_text()
    assert "<svg" in page and "&lt;i&gt;anna 0&lt;/i&gt;" in page and "<i>" not in page
    assert "Krippendorff" in page
    assert not re.search(r"(?:src|href)=[\"'](?!#)(?!data:)", page.replace("xlink:href", "href"))
    assert CliRunner().invoke(app, ["study", "report", str(folder)]).exit_code == 0  # again


def test_what_cannot_be_unblinded_is_an_error(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "set")
    key = write_key(tmp_path / "key.json", ["a"] * 7)
    with pytest.raises(ValueError, match="no rating"):
        unblind(folder, key)
    with pytest.raises(ValueError, match="there is no .*none.json"):
        unblind(folder, tmp_path / "none.json")
    key.write_text(key.read_text().replace('"s1"', '"s2"'))
    with pytest.raises(ValueError, match="key of another study"):
        unblind(folder, key)
    key.write_text(key.read_text()[:-20])
    with pytest.raises(ValueError, match="not whole"):
        unblind(folder, key)
