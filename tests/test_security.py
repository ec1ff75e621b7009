"""What docs/guides/security.md promises, looked for in the package's own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from jumprelu_plugin.models.options import ModelOptions

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted((ROOT / "jumprelu_plugin").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
]
# Files that make hostile files, or look at pickles without building what they name.
WRITES_PICKLES = "benchmarks/fuzz_inputs.py"
LOOKS_AT_PICKLES = "jumprelu_plugin/saes/pickled_tensors.py"
# Calls that run what a file or a string says.
RUNS_CODE = ("eval", "exec", "__import__", "os.system", "yaml.load", "yaml.unsafe_load")
UNPICKLES = (
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "shelve.open",
    "dill.load",
    "dill.loads",
)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_file_s_content_is_run(file: Path) -> None:
    name = file.relative_to(ROOT).as_posix()
    for function, call in calls(file):
        where = f"{name}:{call.lineno} {function}"
        assert function not in (*RUNS_CODE, *UNPICKLES), where
        if function == "torch.load":
            assert keywords(call).get("weights_only") == "True", where
        if function in ("np.load", "numpy.load"):
            assert keywords(call).get("allow_pickle", "False") == "False", where
        if "trust_remote_code" in keywords(call):
            assert keywords(call)["trust_remote_code"] == "False", where
        if function.startswith(("subprocess.", "os.popen")):
            assert keywords(call).get("shell", "False") == "False", where
    imports = {
        alias.name
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    if name not in (WRITES_PICKLES, LOOKS_AT_PICKLES):
        assert not imports & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, name


def test_what_is_looked_for_can_be_found() -> None:
    found = {function for file in SOURCES for function, _ in calls(file)}
    assert {"torch.load", "yaml.safe_load", "subprocess.run"} <= found
    loads = [call for file in SOURCES for name, call in calls(file) if name == "torch.load"]
    assert len(loads) >= 2


def test_no_archive_is_extracted() -> None:
    """Archives are read member by member: a name in one is never a path on this machine."""
    for file in (ROOT / "jumprelu_plugin").rglob("*.py"):
        for function, call in calls(file):
            assert not function.endswith((".extract", ".extractall")), (file.name, call.lineno)
            assert function != "shutil.unpack_archive", (file.name, call.lineno)


def test_a_dictionary_s_metadata_does_not_allow_remote_code(tmp_path: Path) -> None:
    metadata = {
        "model_name": "someone/model",
        "model_from_pretrained_kwargs": {"trust_remote_code": True, "center_unembed": True},
    }
    choice = ModelOptions().resolve(metadata, tmp_path)
    assert "trust_remote_code" not in choice.from_pretrained_kwargs
    assert choice.from_pretrained_kwargs["center_unembed"]  # the others are used


def test_keys_are_neither_read_into_records_nor_logged() -> None:
    """The environment is read by name alone, and no name but one is a key's."""
    for file in sorted((ROOT / "jumprelu_plugin").rglob("*.py")):
        for node in ast.walk(parsed(file)):
            whole = isinstance(node, ast.Call) and any(
                ast.unparse(argument) == "os.environ"
                for argument in [*node.args, *(keyword.value for keyword in node.keywords)]
            )
            assert not whole, (file.name, getattr(node, "lineno", 0))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # The one key that is read goes to its client alone.
                if (file.name, node.value) == ("endpoint.py", "OPENAI_API_KEY"):
                    continue
                named = node.value.isupper() and node.value.endswith(("_KEY", "_TOKEN", "_SECRET"))
                assert not named, (file.name, node.lineno, node.value)
