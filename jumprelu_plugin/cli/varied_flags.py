"""Several dictionaries from one command: flags with several values, or a YAML file.

A flag of what a dictionary has of its own may hold several values with commas between them; every
combination is a dictionary. A YAML file holds the same as a mapping, with a list in place of the
commas, or a list of such mappings. The flags of the command count before what the file says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from jumprelu_plugin.cli.saelens_flags import LIST_FLAGS, Command, normalized, run_config
from jumprelu_plugin.training.multi.config import OWN_FIELDS

NAME = "name"
# The SAE's fields that are not varied: the hook gives d_in; the rest belongs to the run.
_OF_THE_RUN = ("d_in", "dtype", "device", "metadata")
# Named by their values alone.
_PLAIN = ("hook_name", "architecture")

Words = list[str]


def read_dictionaries(
    given: Sequence[str],
    file: Path | None,
    recipe: str | None,
    command: Command,
    widths: Mapping[str, int],
) -> dict[str, Any]:
    """The config of each dictionary's own run, by name.

    Args:
        given: the command's flags.
        file: YAML.
        widths: of the activations, by hook; where a hook is missing, d_in is SAELens' default.

    Raises:
        ValueError: a flag, a value or the file is wrong, or two dictionaries have one name.
        OSError: the file cannot be read.
        SystemExit: with code 0, after `--help` has been printed.
    """
    if {"--help", "-h"} & set(given) or (not given and file is None):
        run_config(["--help"], recipe, command)
    configs: dict[str, Any] = {}
    for name, words in combinations(given, file).items():
        hook = " ".join(words.get("hook_name", [LanguageModelSAERunnerConfig.hook_name]))
        if hook in widths:
            words = {"d_in": [str(widths[hook])], **words}
        flags = [word for flag, values in words.items() for word in (f"--{flag}", *values)]
        configs[name] = run_config(flags, recipe, command)
    return configs


def combinations(given: Sequence[str], file: Path | None) -> dict[str, dict[str, Words]]:
    """What each dictionary is told, by name: the words after each flag."""
    flags = _by_flag(normalized(given))
    found: list[tuple[str, dict[str, Words]]] = []
    for entry in [{}] if file is None else _entries(file):
        told = {**entry, **flags}
        name = " ".join(told.pop(NAME, []))
        options = {flag: _options(flag, words) for flag, words in told.items()}
        found += [
            (name, dict(zip(options, chosen, strict=True))) for chosen in product(*options.values())
        ]
    named: dict[str, dict[str, Words]] = {}
    for name, told in found:
        alike = [other for before, other in found if before == name]
        full = _name(name, told, alike)
        if full in named:
            raise ValueError(
                f"two dictionaries are called {full!r}: give each something of its own, or a name "
                "in the YAML file"
            )
        named[full] = told
    return named


def varied_flags() -> set[str]:
    """The flags that may hold several values."""
    configs = [config for _, config in SAE_TRAINING_CLASS_REGISTRY.values()]
    own = {field.name for config in configs for field in dataclasses.fields(config)}
    return (own | {*OWN_FIELDS, *_PLAIN}) - {*_OF_THE_RUN, *LIST_FLAGS}


def _name(name: str, told: dict[str, Words], alike: Sequence[dict[str, Words]]) -> str:
    """The name, followed by what tells a dictionary from the others of this name."""
    parts = [name] if name else []
    for flag in sorted(told, key=lambda flag: flag not in _PLAIN):
        if any(other.get(flag) != told[flag] for other in alike):
            value = "_".join(told[flag])
            parts.append(value if flag in _PLAIN else f"{flag}_{value}")
    return "-".join(parts) or "sae"


def _options(flag: str, words: Words) -> list[Words]:
    if flag not in varied_flags():
        return [words]
    values = [value for word in words for value in word.split(",") if value]
    return [[value] for value in values] or [words]


def _by_flag(given: Sequence[str]) -> dict[str, Words]:
    """The words after each flag; the last of a repeated flag counts."""
    found: dict[str, Words] = {}
    words: Words | None = None
    for word in given:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            found.pop(flag, None)
            words = found[flag] = [value] if equals else []
        elif words is None:
            raise ValueError(f"{word!r} follows no flag; give flags as --name value")
        else:
            words.append(word)
    return found


def _entries(file: Path) -> list[dict[str, Words]]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    entries = read if isinstance(read, list) else [read]
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(
            f"{file} holds no dictionaries: give a mapping of flags to values, such as "
            "target_l0: [20, 40], or a list of such mappings"
        )
    return [_by_name(entry) for entry in entries]


def _by_name(entry: Mapping[Any, Any]) -> dict[str, Words]:
    """The words after each flag of an entry; an empty value is None, and an empty name no name."""
    words = {
        str(flag).removeprefix("--").replace("-", "_"): _words(value)
        for flag, value in entry.items()
    }
    if words.get(NAME) == ["None"]:
        del words[NAME]
    return words


def _words(value: Any) -> Words:
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
