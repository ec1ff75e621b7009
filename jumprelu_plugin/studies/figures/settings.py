"""Tells records of one architecture apart by the settings that they were trained with.

Means are over seeds, so SAEs that differ in anything else must not share a label.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from jumprelu_plugin.studies.figures.groups import Record

# An architecture may have a learning rate of its own; all else is the same in a fair comparison.
_OF_AN_ARCHITECTURE = ("lr",)
_OF_ALL = ("d_sae", "steps", "batch", "cache_dtype", "weights", "held-out text")


def told_apart(records: Iterable[Record]) -> list[Record]:
    """Each record once, with the settings in which they differ in the name of its architecture.

    Models are compared apart from each other, as their figures are.

    Returns:
        Records whose `architecture` is a label such as "topk, lr 0.003", or what it was where
        nothing differs. `drawn_as` holds the architecture and the number of the label among its
        labels, for `groups.record_look`.
    """
    once = list({json.dumps(record, sort_keys=True): record for record in records}.values())
    differing = _differing(once)
    settings = [
        tuple((name, _setting(record, name)) for name in differing[_kind(record)])
        for record in once
    ]
    variants: dict[str, set[tuple[Any, ...]]] = {}
    for record, own in zip(once, settings, strict=True):
        variants.setdefault(record["architecture"], set()).add(own)
    order = {name: sorted(found, key=_by_value) for name, found in variants.items()}
    return [
        _labelled(record, own, order[record["architecture"]].index(own))
        for record, own in zip(once, settings, strict=True)
    ]


def _labelled(record: Record, settings: Sequence[tuple[str, Any]], variant: int) -> Record:
    name = record["architecture"]
    label = ", ".join([name, *(f"{setting} {value}" for setting, value in settings)])
    return {**record, "architecture": label, "drawn_as": (name, variant)}


def _differing(records: Sequence[Record]) -> dict[tuple[Any, str], list[str]]:
    """For each model and architecture, the names of the settings that tell its records apart."""
    values: dict[tuple[Any, ...], set[Any]] = {}
    for record in records:
        model, architecture = _kind(record)
        for name in _OF_AN_ARCHITECTURE:
            values.setdefault((model, architecture, name), set()).add(_setting(record, name))
        for name in _OF_ALL:
            values.setdefault((model, name), set()).add(_setting(record, name))
    return {
        (model, architecture): [
            *(n for n in _OF_AN_ARCHITECTURE if len(values[model, architecture, n]) > 1),
            *(n for n in _OF_ALL if len(values[model, n]) > 1),
        ]
        for model, architecture in map(_kind, records)
    }


def _kind(record: Record) -> tuple[Any, str]:
    return record.get("model"), record["architecture"]


def _setting(record: Record, name: str) -> Any:
    """A setting's value as its label says it."""
    if name == "lr" and record.get("lr_by_rule"):
        return "by rule"  # the rule gives every site and L0 a rate of its own
    source = record.get("provenance") or {}
    found = {
        "weights": source.get("model_digest"),
        "held-out text": source.get("data_digest"),
    }.get(name, record.get(name))
    if found is None:
        return "not recorded"
    return found if isinstance(found, (int, float)) else str(found)


def _by_value(settings: Sequence[tuple[str, Any]]) -> list[tuple[str, bool, Any]]:
    """Numbers by their size, and before words."""
    return [(name, isinstance(value, str), value) for name, value in settings]
