"""The private names of SAELens that the package holds on to: documented, there, and in use.

docs/project/architecture.md lists them. SAELens may move one without notice; this fails then.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
from sae_lens import llm_sae_training_runner
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.saes import jumprelu_sae
from sae_lens.training import _interruption, activations_store, multi_sae_trainer, sae_trainer

import jumprelu_plugin

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "project" / "architecture.md"
DOCUMENTED = dict(re.findall(r"^\| `([\w.]+\._?\w+)` \| .*? \| (\w+)", PAGE.read_text(), re.M))
MODULE_OF: dict[str, ModuleType] = {
    "JumpReLUTrainingSAE": jumprelu_sae,
    "SAETrainer": sae_trainer,
    "MultiSAETrainer": multi_sae_trainer,
    "ActivationsStore": activations_store,
    "InterruptedException": _interruption,
    "_parse_cfg_args": llm_sae_training_runner,
}


def overridden() -> set[str]:
    """`Class._name` of SAELens, for every method that a class of the package overrides."""
    found = set()
    for module in pkgutil.walk_packages(jumprelu_plugin.__path__, "jumprelu_plugin."):
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        for cls in vars(loaded).values():
            if not inspect.isclass(cls) or cls.__module__ != module.name:
                continue
            for base in cls.__mro__[1:]:
                if base.__module__.startswith("sae_lens"):
                    found |= {
                        f"{base.__name__}.{name}"
                        for name in vars(cls).keys() & vars(base).keys()
                        if re.match(r"_[a-z]", name) and inspect.isfunction(vars(cls)[name])
                    }
    return found


def imported() -> set[str]:
    """Every private name or module of SAELens that a file imports, by its last two parts."""
    found = set()
    for file in (ROOT / "jumprelu_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lens"):
                paths = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {path.removeprefix("sae_lens.") for path in paths if "._" in path}
    return found


def test_what_is_overridden_is_documented() -> None:
    documented = {name for name, how in DOCUMENTED.items() if how == "overridden"}
    assert overridden() == documented


def test_what_is_imported_is_documented() -> None:
    assert imported() <= DOCUMENTED.keys()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_saelens_still_has_it_and_uses_it(name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    module = MODULE_OF.get(owner) or MODULE_OF[attribute]
    source = inspect.getsource(module)
    if owner in MODULE_OF:
        source = inspect.getsource(getattr(module, owner))
        assert re.search(rf"\b(self|super\(\))\.{attribute}\b", source), (
            f"SAELens no longer uses {name}"
        )
    assert re.search(rf"\b{attribute}\b", source), f"SAELens no longer has {name}"


@pytest.mark.parametrize("name", ["hf_hub_download", "get_safetensors_tensor_shapes"])
def test_the_patched_functions_are_the_ones_the_loaders_call(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text()
    assert len(re.findall(rf"\b{name}\(", inspect.getsource(pretrained_sae_loaders))) > 1
