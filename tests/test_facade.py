"""`import jumprelu_plugin`: what it costs, what it leaves alone, and the names it gives."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jumprelu_plugin

ROOT = Path(__file__).parents[1]
# In units of 2,000 small functions compiled and defined, which is work of the same kind: the import
# takes 1.24 to 1.35 of them. A processor that is slower or shared is so for both.
MOST_TIME = 2.0

# SAELens is imported first: what it loads and costs is not the plugin's. It takes 6 s, so it is
# imported once; the plugin is imported in four forks of that process and then in itself.
SCRIPT = """
import gc, json, os, sys, time
import sae_lens, torch

def no_device(*_, **__):
    raise RuntimeError("a CUDA device was asked for")

for name in ("_lazy_init", "device_count", "get_device_capability", "is_available"):
    setattr(torch.cuda, name, no_device)
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
before = set(sys.modules)
gc.freeze()  # a fork then copies fewer pages
for _ in range(4):
    child = os.fork()
    if child == 0:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
gc.unfreeze()
for stream in (sys.stdout, sys.stderr):
    print("AN IMPORT BEGINS", file=stream, flush=True)
source = "\\n".join(f"def f{i}(x): return [x, {i}]" for i in range(2000))
units = []
for _ in range(3):
    start = time.process_time()
    exec(compile(source, "", "exec"), {})
    units.append(time.process_time() - start)
start = time.process_time()
import jumprelu_plugin
seconds = time.process_time() - start
for stream in (sys.stdout, sys.stderr):
    print("AN IMPORT ENDS", file=stream, flush=True)
packages = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({
    "units": seconds / min(units),
    "packages": packages,
    "run": getattr(sys.modules.get("wandb"), "run", None) is not None,
    "cuda": torch.cuda.is_initialized(),
    "registered": jumprelu_plugin.is_registered(),
}), flush=True)
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Five imports in a new process: what each says of itself, what was printed on stdout and
    stderr before and in it, and the files that were left behind.

    The first compiles to bytecode, as an installation's first import does.
    """
    bytecode, folder = tmp_path_factory.mktemp("bytecode"), tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(bytecode)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (before, *outs), (warned, *errors) = (
        text.split("AN IMPORT BEGINS\n") for text in (done.stdout, done.stderr)
    )
    found = []
    for out, error in zip(outs, errors, strict=True):
        printed, said = out.split("AN IMPORT ENDS\n")
        complained, after = error.split("AN IMPORT ENDS\n")
        printed = [before, warned, printed, complained, after]
        left = [path.name for path in folder.iterdir()]
        found.append({**json.loads(said), "printed": printed, "left": left})
    assert len(found) == 5
    return found


def test_importing_it_prints_nothing_and_starts_nothing(imports: list[dict[str, Any]]) -> None:
    for each in imports:
        assert each["printed"] == [""] * 5 and each["left"] == []
        assert not each["run"] and not each["cuda"]
        assert each["registered"]


def test_importing_it_loads_nothing_that_saelens_does_not(imports: list[dict[str, Any]]) -> None:
    """So no plotting, and wandb only because SAELens itself imports it."""
    others = set(imports[0]["packages"]) - {"jumprelu_plugin", "lazy_loader"}
    assert others <= set(sys.stdlib_module_names)


def test_importing_it_is_quick(imports: list[dict[str, Any]]) -> None:
    """CPU time, which other processes disturb little; the least of four for the same reason."""
    assert min(each["units"] for each in imports[1:]) < MOST_TIME


# ---------------------------------------------------------------- the names


IMPORTS = [
    ((node.module or "").partition(".")[2], alias)
    for node in ast.walk(ast.parse((ROOT / "jumprelu_plugin" / "__init__.py").read_text()))
    if isinstance(node, ast.ImportFrom) and node.col_offset
    for alias in node.names
]
NAMES = {alias.name: module for module, alias in IMPORTS}


def test_each_name_is_imported_once_as_a_re_export() -> None:
    # `from x import y as y` is what type checkers take for a re-export.
    assert all(alias.asname == alias.name for _, alias in IMPORTS)
    assert len(IMPORTS) == len(NAMES) > 40


def test_dir_and_all_are_the_imports() -> None:
    assert set(dir(jumprelu_plugin)) == set(jumprelu_plugin.__all__) == set(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_is_what_its_module_gives_and_is_documented(name: str) -> None:
    value = getattr(jumprelu_plugin, name)
    module = importlib.import_module(f"jumprelu_plugin.{NAMES[name] or name}")
    assert value is (getattr(module, name) if NAMES[name] else module)
    if not isinstance(value, str):
        words = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        # A dataclass without a docstring is given its signature for one.
        assert words and not words.startswith(f"{name}(")


def test_names_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(AttributeError, match="jumprelu_plugin.*JumpReLUTrainingSAEs"):
        jumprelu_plugin.JumpReLUTrainingSAEs  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="JumpReLUTrainingSAEs"):
        exec("from jumprelu_plugin import JumpReLUTrainingSAEs")
