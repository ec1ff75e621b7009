"""The report opens from disk, without network, and is legible on a screen and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.studies.explain.record import write_record
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from jumprelu_plugin.studies.plot import plot_sweep
from jumprelu_plugin.studies.rating.ratings import append_change
from jumprelu_plugin.studies.rating.report import write_rating_report
from jumprelu_plugin.studies.report import Section, write_report
from tests.studies.explain.results import explanation_result
from tests.studies.rating.studies import write_key, write_study
from tests.studies.sweep_records import sweep_records, write_records

# What a browser lays out: panels, the size of their text in CSS pixels, and the page's full width.
PROBE = """
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll(".panel svg")].map(svg => {
    const box = svg.getBoundingClientRect(), scale = svg.getScreenCTM().a;
    const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim());
    const outside = texts.map(t => t.getBoundingClientRect()).filter(t => t.left < box.left - 1
      || t.right > box.right + 1 || t.top < box.top - 1 || t.bottom > box.bottom + 1);
    const sizes = texts.map(t => scale * parseFloat(getComputedStyle(t).fontSize));
    return {width: box.width, height: box.height, right: box.right, texts: texts.length,
            smallest: Math.min(...sizes), outside: outside.length};
  });
  const wide = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify({boxes, wide, inner: innerWidth}), "*");
});
"""
# A window of Chromium is at least 500 pixels wide; a frame can be as narrow as a phone.
FRAME = """
<body><script>
addEventListener("message", event => document.body.setAttribute("data-found", event.data));
</script><iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe></body>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plot")
    write_records(folder / "records.jsonl", sweep_records())
    studies = [explained(folder / "explained"), rated(folder / "rated")]
    more = Section("More <b>sections</b>", ["a < b"])
    return plot_sweep([folder, *studies], folder / "out", more=[more])


def explained(folder: Path) -> Path:
    """The folder of a study by a language model."""
    settings = ExplainSettings(), BackendSettings()
    return write_record(folder, explanation_result(), *settings, {}).parent


def rated(folder: Path) -> Path:
    """The folder of a report of ratings."""
    study = write_study(folder.with_name("set"))
    key = write_key(folder.with_name("key.json"), ["jumprelu-plugin"] * 3 + ["topk"] * 4)
    for number in range(7):
        change = {"item": f"i{number}", "rating": "yes" if number < 4 else "no"}
        append_change(study / "ratings" / "anna.jsonl", change)
    write_rating_report(study, key, folder)
    return folder


def few_records(path: Path) -> Path:
    """Records of one figure."""
    known = ("site", "architecture", "target_l0", "seed", "l0", "fvu")
    return write_records(path, [{n: r[n] for n in known} for r in sweep_records()[:4]])


def in_browser(page: Path, width: int, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """What the probe found, and what the browser's console said."""
    text = page.read_text()
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1400,900", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=20000", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(found[1].replace("&quot;", '"')), said


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_visible_and_legible(page: Path, width: int, tmp_path: Path) -> None:
    found, said = in_browser(page, width, tmp_path)
    assert found["inner"] == width and said == ""
    assert found["wide"] <= width
    assert len(found["boxes"]) == page.read_text().count('<figure class="panel"') > 15
    for box in found["boxes"]:
        assert box["width"] > 300 and box["height"] > 200 and box["right"] <= width
        assert box["texts"] > 5 and box["outside"] == 0
        assert box["smallest"] > 10


def test_text_is_never_markup(page: Path) -> None:
    text = page.read_text()
    assert "&lt;b&gt;sections&lt;/b&gt;" in text and "<b>sections</b>" not in text
    assert "A &lt;CPU&gt;" in text and "a &lt; b" in text
    assert "words like &lt;b&gt;sea&lt;/b&gt;" in text and "a &lt;model&gt; explained" in text


def test_studies_stand_beside_the_sweep(page: Path) -> None:
    text = page.read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert [t for t in titles if "xplan" in t or "Rat" in t or "rater" in t] == [
        "Explanations scored", "Explanations compared", "Explanations",
        "Ratings", "Agreement of raters", "Ratings compared", "Rated latents",
    ]  # fmt: skip
    assert "Krippendorff" in text
    names = {"explanation_correlations", "explanation_density", "ratings", "frontier_fvu"}
    assert names < {path.stem for path in page.parent.glob("*.png")}


def test_studies_alone_and_what_cannot_be(tmp_path: Path) -> None:
    one, two = explained(tmp_path / "one"), explained(tmp_path / "two")
    page = plot_sweep([one], tmp_path / "out").read_text()
    assert "Frontiers" not in page and "Explanations scored" in page
    with pytest.raises(ValueError, match="two.*is a second explanation study"):
        plot_sweep([one, two], tmp_path / "twice")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="record of kind 'None'; expected 'explanation study'"):
        plot_sweep([tmp_path / "other.json"], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_it_needs_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text.replace("xlink:href", "xlink"))
    assert "<script" not in text and "@import" not in text
    assert "default-src 'none'" in text
    # Links inside the drawings are to their own parts, and no two drawings share a name.
    inside = re.findall(r'xlink:href="([^"]*)"', text)
    assert inside and all(link.startswith("#") for link in inside)
    ids = re.findall(r'<(?:clipPath|path) id="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_a_broken_last_line_is_said_and_left_out(tmp_path: Path) -> None:
    path = few_records(tmp_path / "r.jsonl")
    with path.open("a") as file:
        file.write('{"site": "blo')
    said: list[str] = []
    plot_sweep([path], tmp_path / "out", log=said.append)
    assert "the last line of" in said[0] and (tmp_path / "out" / "report.html").exists()


def test_a_report_without_sections(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one section"):
        write_report(tmp_path / "r.html", "title", [])


def test_command(tmp_path: Path) -> None:
    path = few_records(tmp_path / "r.jsonl")
    arguments = ["plot", str(path), "--output-path", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".png", ".svg", ".html"}
    done = CliRunner().invoke(app, ["plot", str(tmp_path), "--output_path", str(tmp_path / "o")])
    assert done.exit_code == 2 and "there are no records at" in " ".join(done.output.split())
