"""The documents' Python runs, their links resolve, and the commands they show are taken.

Python that a document does not run itself is an excerpt of an example, word for word, which runs.
"""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from jumprelu_plugin.cli.app import app
from jumprelu_plugin.cli.saelens_flags import parse_flags

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)


@document
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for marker, code in re.findall(r"```python( no-run)?\n(.*?)```", path.read_text(), re.S):
        compiled = compile(code, str(path), "exec")
        if not marker:
            exec(compiled, names)


@document
def test_relative_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


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
        if "--help" in arguments:
            continue
        context = known[name].make_context(name, list(arguments))
        if name == "train":
            cfg = parse_flags(["--architecture", "jumprelu", *context.args])
            assert cfg.sae.architecture().startswith("jumprelu") and cfg.sae.target_l0


def test_the_readme_shows_every_command() -> None:
    assert {"demo", "train", "evaluate", "steer", "recipes"} <= {
        line[0] for line in commands(ROOT / "README.md")
    }
