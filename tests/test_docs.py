"""The documents' Python runs, their links resolve, and the commands they show exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from jumprelu_plugin.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
def test_commands_exist(path: Path) -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S):
        for name in re.findall(r"\bjumprelu ([a-z]+)", block):
            assert name in commands
