"""The documents' Python runs, their links resolve, the commands they show are taken.

Python that a document does not run itself is an excerpt of an example, word for word, which runs.
The reference is what the code says, and the tables are what the records say.
"""

import ast
import functools
import re
import runpy
import shlex
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
from sae_lens import SAE
from typer.main import get_command

from benchmarks import gpu_report, quality_report, report, tables
from jumprelu_plugin.cli.app import app
from jumprelu_plugin.cli.saelens_flags import parse_flags

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
PYTHON = re.compile(r"```python( no-run)?\n(.*?)```", re.S)


def run_blocks(path: Path) -> None:
    names: dict[str, object] = {}
    for marker, code in PYTHON.findall(path.read_text()):
        if not marker:
            exec(compile(code, str(path), "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS[1:], ids=lambda path: path.stem)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(path)


def test_the_readme_script_trains_a_stock_sae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenized_once: None
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(README)
    sae = SAE.load_from_disk("sae")
    assert type(sae).__module__.startswith("sae_lens.")
    assert sae.cfg.metadata.l0 == pytest.approx(32, rel=0.1)
    script = PYTHON.findall(README.read_text())[0][1]
    assert len(script.splitlines()) <= 20


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=lambda path: path.stem)
def test_users_import_from_the_facade_alone(path: Path) -> None:
    text = path.read_text()
    sources = [text] if path.suffix == ".py" else [code for _, code in PYTHON.findall(text)]
    for source in sources:
        for node in ast.walk(ast.parse(textwrap.dedent(source))):
            if isinstance(node, ast.ImportFrom) and "jumprelu_plugin" in (node.module or ""):
                assert node.module == "jumprelu_plugin"
            if isinstance(node, ast.Import):
                assert not any("jumprelu_plugin." in alias.name for alias in node.names)


@functools.cache
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@document
def test_links_resolve(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), f"{target}#{anchor}"


@document
def test_every_page_is_linked_from_the_readme(path: Path) -> None:
    linked = {(ROOT / t).resolve() for t in re.findall(r"\]\(([^)#:]+)", README.read_text())}
    assert path in {*linked, README}


@document
def test_what_does_not_run_here_is_part_of_an_example_that_runs(path: Path) -> None:
    text = path.read_text()
    excerpts = re.findall(r"<!-- (examples/\S+\.py) -->\n```python no-run\n(.*?)```", text, re.S)
    assert len(excerpts) == text.count("```python no-run")
    for file, code in excerpts:
        assert unindented(code) in unindented((ROOT / file).read_text()), f"{file}:\n{code}"


def unindented(code: str) -> str:
    return "\n".join(line.strip() for line in code.splitlines())


def commands(path: Path) -> list[list[str]]:
    """The `jumprelu` commands of a document's shell blocks, as lists of arguments."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", path.read_text(), re.S))
    whole = lines.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line) for line in whole]
    return [line[1:] for line in words if line[:1] == ["jumprelu"]]


@document
def test_commands_are_taken(path: Path) -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    for name, *arguments in commands(path):
        assert name in known
        command = known[name]
        while hasattr(command, "commands"):  # a group, such as study
            command = command.commands[arguments.pop(0)]
        if "--help" in arguments:
            continue
        context = command.make_context(name, list(arguments))
        if name == "train":
            cfg = parse_flags(["--architecture", "jumprelu", *context.args])
            assert cfg.sae.architecture().startswith("jumprelu") and cfg.sae.target_l0


def test_the_readme_shows_the_commands_and_how_to_test() -> None:
    assert {"demo", "train", "evaluate", "steer", "recipes"} <= {
        line[0] for line in commands(README)
    }
    test = 'python -m pip install -c constraints.txt -e ".[dev]" && python -m pytest -n 2'
    assert test in README.read_text()


@pytest.mark.parametrize("page", ["config.md", "command-line.md", "api.md"])
def test_the_reference_is_what_the_code_says(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    generated = import_module("generate_reference").PAGES[page]()
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == generated, "run: python tools/generate_reference.py"


@pytest.mark.parametrize("path", quality_report.DOCUMENTS, ids=lambda path: path.stem)
def test_tables_of_quality_are_what_the_records_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    drawn = tables.fill(text, "results", quality_report.BLOCKS)
    assert drawn == text, "run: python -m benchmarks.quality_report"


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.stem)
def test_tables_of_speed_are_what_the_records_say(path: Path) -> None:
    text, records = path.read_text(encoding="utf-8"), tables.read(report.RESULTS)
    blocks = {name: functools.partial(draw, records) for name, draw in report.BLOCKS.items()}
    drawn = tables.fill(text, "speed", blocks)
    assert drawn == text, "run: python -m benchmarks.report"


def test_tables_of_the_gpu_are_what_the_records_say() -> None:
    text = gpu_report.DOCUMENT.read_text(encoding="utf-8")
    drawn = gpu_report.filled(text, tables.read(gpu_report.RESULTS))
    assert drawn == text, "run: python -m benchmarks.gpu_report"


def test_every_table_and_figure_has_a_place() -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert set(re.findall(r"<!-- results:(\w+) -->", text)) == set(quality_report.BLOCKS)
    assert set(re.findall(r"<!-- speed:(\w+) -->", text)) == set(report.BLOCKS)
    teaching = (ROOT / "examples" / "17_teaching_figures.py").read_text()
    assert set(re.findall(r"<!-- gpu:(\w+) -->", text)) == set(gpu_report.BLOCKS)
    drawn = {*quality_report.FIGURE_OF, report.FIGURE.name, gpu_report.FIGURE.name}
    drawn |= {f"{name}.png" for name in re.findall(r'save\(drawn, "(\w+)"\)', teaching)}
    assert {path.name for path in tables.FIGURES.iterdir()} == drawn
    assert set(re.findall(r"figures/(\w+\.png)", text)) == drawn


def test_pages_that_the_code_names_exist() -> None:
    for folder in ("jumprelu_plugin", "benchmarks", "examples", "tests", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text()):
                assert (ROOT / page).exists(), f"{file.relative_to(ROOT)}: {page}"


def test_files_that_the_pages_name_exist() -> None:
    rooms = "|".join(path.name for path in (ROOT / "jumprelu_plugin").iterdir() if path.is_dir())
    named = rf"`((?:jumprelu_plugin|benchmarks|tests|tools|examples|{rooms})/[\w/.]+\.\w+)`"
    for page in DOCUMENTS:
        for path in re.findall(named, page.read_text()):
            found = [folder / path for folder in (ROOT, ROOT / "jumprelu_plugin")]
            assert any(file.exists() for file in found), f"{page.relative_to(ROOT)}: {path}"


def test_the_private_names_of_saelens_in_use_are_documented() -> None:
    (contract,) = (ROOT / "tests").rglob("test_saelens_contract.py")
    listed = [
        (f"{re.split('[.:]', private.owner)[-1]}.{private.name}", private.used)
        for private in runpy.run_path(str(contract))["PRIVATE"]
    ]
    page = (ROOT / "docs" / "project" / "architecture.md").read_text()
    assert re.findall(r"^\| `(\w+\.\w+)` \| (.*) \|$", page, re.M) == listed


# Words that a reader of the field does not know, or knows as something else.
PRIVATE = (
    r"steered training|inner dictionar|as it comes|\bours\b|\brungs?\b|\bladder\b|\bseams?\b"
    r"|asked for|restarted|frequency ceiling|\bworth\b"
)


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.parent.name != "reference"], ids=lambda path: path.stem
)
def test_documents_speak_the_language_of_the_field(path: Path) -> None:
    assert re.findall(PRIVATE, path.read_text(), re.I) == []
