"""What is imported is declared, and everything parses on the oldest Python that is promised."""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where an import's name is not the distribution's.
DISTRIBUTION = {
    "circuit_tracer": "circuit-tracer",
    "huggingface_hub": "huggingface-hub",
    "lazy_loader": "lazy-loader",
    "simple_parsing": "simple-parsing",
    "dictionary_learning": "dictionary-learning",
    "sae_bench": "sae-bench",
    "sae_dashboard": "sae-dashboard",
    "sae_lens": "sae-lens",
    "sae_probes": "sae-probes",
    "sklearn": "scikit-learn",
    "transformer_lens": "transformer-lens",
    "yaml": "pyyaml",
}
BESIDE = {path.stem for path in (ROOT / "tools").glob("*.py")}


def declared() -> dict[str, set[str]]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in requirements}
        for group, requirements in groups.items()
    }


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(), feature_version=(3, 10))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    names -= set(sys.stdlib_module_names) | {"jumprelu_plugin", "benchmarks", "tests"}
    return {DISTRIBUTION.get(name, name) for name in names}


def test_the_package_imports_what_it_declares() -> None:
    groups = declared()
    everything = set().union(*groups.values())
    optional = everything - groups[""]
    for file in (ROOT / "jumprelu_plugin").rglob("*.py"):
        undeclared = imported(file) - groups[""]
        # An extra may be imported where it is used, and must be declared as one.
        assert undeclared <= optional, (file.name, undeclared - optional)


@pytest.mark.parametrize("folder", ["tests", "examples", "tools"])
def test_what_stands_beside_it_imports_what_is_declared(folder: str) -> None:
    # The tools exported to are installed by tools/circuit_env.sh, without what they declare.
    tools = (ROOT / "tools" / "circuit_tools.txt").read_text().splitlines()
    everything = set().union(*declared().values(), (tool.split("==")[0] for tool in tools))
    for file in (ROOT / folder).rglob("*.py"):
        assert imported(file) - BESIDE <= everything, file.name


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """`py.typed` and the embedded model among them."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        packed = {name for name in archive.namelist() if name.startswith("jumprelu_plugin/")}
    files = {path for path in (ROOT / "jumprelu_plugin").rglob("*") if path.is_file()}
    expected = {
        path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts
    }
    assert "jumprelu_plugin/py.typed" in expected
    assert packed == expected
