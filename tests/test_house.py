"""The package's own rules: which room may import which, and how much one place may hold.

The order of the rooms is DESIGN.md's and is written here once: a file imports only from rooms below
its own, so no two rooms need each other, and whoever reads a file can stop at what it imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jumprelu_plugin"
FILES = sorted(ROOT.rglob("*.py"))
FOLDERS = sorted({file.parent for file in FILES})

# From the bottom up. A room may import those before it.
ROOMS = (
    "records",
    "models",
    "step",
    "analysis",
    "evaluation",
    "control",
    "saes",
    "registration",
    "training",
    "recipes",
    "transcoders",
    "formats",
    "circuits",
    "finetune",
    "studies",
    "cli",
    "__main__",
    "__init__",
)
MOST_ENTRIES, MOST_LINES, MOST_METHODS, MOST_CLASS_LINES = 18, 400, 20, 300

# Underscore names of PyTorch and SAELens that a class of the package has too.
INHERITED = {"_iterate_filtered_activations", "_parameters"}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, int, str]]:
    """What a file imports of the package, anywhere in it: room, line, name."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("jumprelu_plugin."):
                    yield alias.name.split(".")[1], node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(file)}:{node.lineno} is a relative import"
            package, _, module = (node.module or "").partition(".")
            if package == "jumprelu_plugin":
                for alias in node.names:
                    yield (module or alias.name).split(".")[0], node.lineno, alias.name


def test_the_order_names_every_room() -> None:
    assert sorted(ROOMS) == sorted({room_of(file) for file in FILES})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    upward = [
        f"{name_of(file)}:{line} imports {name} from {there}"
        for file in FILES
        if room_of(file) == room
        for there, line, name in imports(file)
        if there not in allowed
    ]
    assert not upward


def test_nothing_below_the_facade_imports_the_registration() -> None:
    """Registering is what `import jumprelu_plugin` does; nothing below may depend on it."""
    importers = {name_of(f) for f in FILES if any(r == "registration" for r, _, _ in imports(f))}
    assert importers <= {"__init__.py"}


def test_the_package_has_few_entries() -> None:
    entries = {path.name for path in ROOT.iterdir()}
    entries -= {"__pycache__", "py.typed", "__main__.py"}  # what Python and type checkers look for
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_files_are_short() -> None:
    long = {name_of(file) for file in FILES if len(file.read_text().splitlines()) > MOST_LINES}
    assert not long


def test_classes_are_short() -> None:
    classes = [
        node for file in FILES for node in ast.walk(parsed(file)) if isinstance(node, ast.ClassDef)
    ]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    many = {c.name for c in classes if sum(isinstance(x, functions) for x in c.body) > MOST_METHODS}
    long = {c.name for c in classes if (c.end_lineno or 0) - c.lineno + 1 > MOST_CLASS_LINES}
    assert not many | long


def test_no_file_imports_an_underscore_name_of_another() -> None:
    borrowed = {
        (name_of(file), name)
        for file in FILES
        for _, _, name in imports(file)
        if name.rsplit(".", 1)[-1].startswith("_")
    }
    assert not borrowed


def own_privates(node: ast.ClassDef) -> Iterator[str]:
    """The underscore names a class gives itself: methods, fields, and what it sets on `self`."""
    for part in ast.walk(node):
        name = ""
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            name = part.name
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            name = part.target.id
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            name = part.attr if ast.unparse(part.value) == "self" else ""
        if name.startswith("_") and not name.startswith("__"):
            yield name


def touched(node: ast.AST, mine: frozenset[str] = frozenset()) -> Iterator[str]:
    """The underscore names taken of anything but `self`, outside the class they belong to."""
    for part in ast.iter_child_nodes(node):
        inside = frozenset(own_privates(part)) if isinstance(part, ast.ClassDef) else mine
        if isinstance(part, ast.Attribute) and part.attr.startswith("_"):
            owner = ast.unparse(part.value)
            if owner not in ("self", "cls", "super()") and part.attr not in inside:
                yield part.attr
        yield from touched(part, inside)


def test_nothing_outside_a_class_touches_its_underscore_names() -> None:
    classes = [c for f in FILES for c in ast.walk(parsed(f)) if isinstance(c, ast.ClassDef)]
    private = {name for node in classes for name in own_privates(node)} - INHERITED
    foreign = {(name_of(f), name) for f in FILES for name in touched(parsed(f)) if name in private}
    assert not foreign


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_every_folder_says_what_it_is_for(folder: Path) -> None:
    init = folder / "__init__.py"
    assert init.exists() and ast.get_docstring(parsed(init))


def test_tests_stand_in_the_room_that_they_test() -> None:
    tests = Path(__file__).parent
    rooms = {file.relative_to(tests).parts[0] for file in tests.glob("*/**/*.py")}
    assert rooms <= {*ROOMS, "benchmarks", "contract"}
    long = {str(f) for f in tests.rglob("*.py") if len(f.read_text().splitlines()) > MOST_LINES}
    assert not long
