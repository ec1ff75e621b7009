"""What this package overrides, calls or patches of SAELens that SAELens does not promise to keep.

`PRIVATE` and `PATCHED` are the whole list. A release of SAELens that renames one of them, moves it
or gives it other parameters fails here, by name, and not in the middle of somebody's run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest

import jumprelu_plugin


class Private(NamedTuple):
    """A private name of SAELens'.

    Attributes:
        owner: the module, or the class with its module before a colon.
        parameters: of a method or function, without self; None for an attribute or a class.
        used: where, and what for.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    used: str


_TRAINER = "sae_lens.training.sae_trainer:SAETrainer"
_SET_TRAINER = "sae_lens.training.multi_sae_trainer:MultiSAETrainer"
_SET_RUNNER = "sae_lens.multi_sae_training_runner:MultiSAETrainingRunner"
_STORE = "sae_lens.training.activations_store:ActivationsStore"

PRIVATE = (
    Private(
        _TRAINER,
        "_update_pbar",
        ("step_output", "pbar", "update_interval"),
        "overridden in training/trainer.py: the last call of a step, where it shows and saves",
    ),
    Private(
        _TRAINER,
        "_checkpoint_if_needed",
        (),
        "overridden in training/trainer.py: put off until the step is counted",
    ),
    Private(
        _TRAINER,
        "_build_sparsity_log_dict",
        (),
        "overridden in training/trainer.py: no wandb histogram in a run without wandb; in "
        "training/distributed/trainer.py: of all shards' latents",
    ),
    Private(
        _TRAINER,
        "_train_step",
        ("sae", "sae_in"),
        "overridden in training/distributed/trainer.py: what a log needs of all shards",
    ),
    Private(
        _SET_TRAINER,
        "_update_pbar",
        ("step_outputs", "pbar", "update_interval"),
        "overridden in training/multi/trainer.py: the last call of a step, where it shows and "
        "saves",
    ),
    Private(
        _SET_TRAINER,
        "_checkpoint_if_needed",
        (),
        "overridden in training/multi/trainer.py: put off until the step is counted",
    ),
    Private(
        _SET_TRAINER,
        "_estimate_scaling_factors",
        (),
        "overridden in training/multi/trainer.py: without keeping batches; in "
        "transcoders/per_layer/runner.py: two scales each",
    ),
    Private(
        _SET_RUNNER,
        "_set_sae_metadata",
        (),
        "called in training/multi/runner.py and transcoders/per_layer/runner.py",
    ),
    Private(
        _SET_RUNNER,
        "_save_runner_checkpoint_files",
        ("checkpoint_path",),
        "called in training/multi/runner.py and transcoders/per_layer/runner.py",
    ),
    Private(
        _SET_RUNNER,
        "_save_final_outputs",
        ("saes", "trainer"),
        "called in training/multi/runner.py and transcoders/per_layer/runner.py",
    ),
    Private(
        _STORE,
        "_iterate_raw_dataset",
        (),
        "overridden in training/activations/checked_text.py to check rows of tokens",
    ),
    Private(
        _STORE,
        "_iterate_tokenized_sequences",
        (),
        "overridden in training/activations/store.py to count and in checked_text.py to refuse "
        "text of none, called in pairs.py to read apart",
    ),
    Private(
        _STORE,
        "_iterate_filtered_activations",
        (),
        "overridden in training/activations/store.py to refuse what is not finite",
    ),
    Private(
        _STORE,
        "_get_filtered_multi_hook_llm_batch",
        ("raise_on_epoch_end",),
        "called in training/activations/multi_hook.py and pairs.py: all hooks from one forward "
        "pass",
    ),
    Private(
        _STORE,
        "_hook_d_ins",
        None,
        "read in training/activations/multi_hook.py and pairs.py",
    ),
    Private(_STORE, "_hook_names", None, "read in training/activations/multi_hook.py"),
    Private(_STORE, "_dataloader", None, "set in training/activations/store.py on resuming"),
    Private(
        "sae_lens.saes.sae:SAE",
        "_setup_activation_normalization",
        (),
        "called in saes/storage.py: a copy's normalization functions are its own",
    ),
    Private(
        "sae_lens.training._interruption",
        "InterruptedException",
        None,
        "raised where a run is stopped, as SAELens does",
    ),
)
# Replaced while an export is read back (formats/saelens_loaders.py), so that the loaders of
# sae_lens.loading.pretrained_sae_loaders find their files in a folder: nothing else is patched.
PATCHED = {
    "hf_hub_download": ("repo_id", "filename"),
    "get_safetensors_tensor_shapes": ("repo_id", "filename"),
}


def _owner(path: str) -> Any:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _sets_on_self(owner: type, name: str) -> bool:
    """Whether the class annotates an attribute or sets it on its instances."""
    source = inspect.getsource(owner)
    return bool(re.search(rf"self\.{name}\b.* = |^    {name}\s*[:=]", source, re.MULTILINE))


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: private.name)
def test_a_private_name_is_where_it_was_with_its_parameters(private: Private) -> None:
    owner = _owner(private.owner)
    if inspect.isclass(owner) and private.parameters is None:
        assert _sets_on_self(owner, private.name)
        return
    found = vars(owner)[private.name]
    if private.parameters is not None:
        assert tuple(_parameters(found)) == private.parameters


@pytest.mark.parametrize(("name", "parameters"), PATCHED.items())
def test_loaders_call_what_is_patched_by_its_global_name(
    name: str, parameters: tuple[str, ...]
) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    assert tuple(_parameters(getattr(loaders, name))[: len(parameters)]) == parameters
    # Called beside its own definition, by the name that is replaced.
    calls = re.findall(rf"^(?!def ).*\b{name}\(", inspect.getsource(loaders), re.MULTILINE)
    assert calls


@pytest.mark.parametrize("path", [_TRAINER, _SET_TRAINER])
def test_a_step_is_counted_between_the_checkpoint_and_the_progress_bar(path: str) -> None:
    source = inspect.getsource(_owner(path).fit)
    calls = ("_checkpoint_if_needed()", "self.n_training_steps += 1", "_update_pbar(")
    places = [source.index(call) for call in calls]
    assert places == sorted(places)
    rest = source[places[-1] :].splitlines()[1:]
    # Nothing of the loop comes after it.
    indent = len(re.search(r"( *)self\._update_pbar\(", source).group(1))  # type: ignore[union-attr]
    following = next(line for line in rest if line.strip())
    assert len(following) - len(following.lstrip()) < indent


# ---------------------------------------------------------------- the list is the whole list


def _classes() -> Iterator[type]:
    """The package's classes that stand on one of SAELens'."""
    for module in pkgutil.walk_packages(jumprelu_plugin.__path__, "jumprelu_plugin."):
        if module.name.endswith("__main__"):
            continue
        found = importlib.import_module(module.name)
        for value in vars(found).values():
            if inspect.isclass(value) and value.__module__ == module.name and _bases(value):
                yield value


def _bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__[1:] if base.__module__.startswith("sae_lens")]


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_abc_impl"


def test_no_other_private_name_of_saelens_is_overridden_or_used() -> None:
    listed = {private.name for private in PRIVATE}
    used = set()
    for kind in _classes():
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for name in filter(_private, names | set(vars(kind))):
            for base in _bases(kind):
                of_torch = any(name in vars(above) for above in base.__mro__ if _is_torch(above))
                if not of_torch and (name in vars(base) or _sets_on_self(base, name)):
                    used.add(name)
    assert used - listed == set()
    assert "_update_pbar" in used  # what was looked for can be found


def _is_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch")


def test_no_other_private_name_is_imported_from_saelens() -> None:
    listed = {(private.owner, private.name) for private in PRIVATE}
    found = set()
    for module in pkgutil.walk_packages(jumprelu_plugin.__path__, "jumprelu_plugin."):
        spec = find_spec(module.name)
        assert spec is not None and spec.loader is not None
        source = spec.loader.get_source(module.name)  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lens"):
                for alias in node.names:
                    if any(
                        part.startswith("_") for part in f"{node.module}.{alias.name}".split(".")
                    ):
                        found.add((node.module, alias.name))
    assert found <= listed
    assert found


def test_overrides_take_the_parameters_that_saelens_passes() -> None:
    for kind in _classes():
        for name, value in vars(kind).items():
            if not inspect.isfunction(value) or name.startswith("__"):
                continue
            for base in _bases(kind):
                theirs = vars(base).get(name)
                if not inspect.isfunction(theirs):
                    continue
                ours, expected = _parameters(value), _parameters(theirs)
                if ours == ["args", "kwargs"]:  # takes whatever comes
                    continue
                place = f"{kind.__name__}.{name}{tuple(ours)}, {base.__name__}'s {tuple(expected)}"
                assert ours[: len(expected)] == expected, place
