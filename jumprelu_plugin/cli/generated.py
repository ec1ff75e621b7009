"""Options made from a dataclass: a field is a flag, its documentation the flag's help."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from jumprelu_plugin.cli.field_help import field_help
from jumprelu_plugin.cli.values import names_and_values
from jumprelu_plugin.models.number_lists import whole_numbers


def with_dataclass_options(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command from a function that takes dataclasses: each becomes an option a field.

    Fields may be str, int, float, bool, a Literal of strings, a tuple of ints (a list on the
    command line), a dict (JSON on the command line), or one of these or None.

    Raises:
        KeyError: a field is not documented in its class's docstring.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[_Option]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            options = _options(hint)
            groups[parameter.name] = hint, options
            parameters += [option.parameter() for option in options]
        else:
            parameters.append(parameter.replace(annotation=hint))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (made, options) in groups.items():
            given[name] = made(**{o.field.name: o.read(given.pop(o.field.name)) for o in options})
        command(**given)

    # Keyword-only, because an option with a default may stand before one without.
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@dataclasses.dataclass(frozen=True)
class _Option:
    """A field of a dataclass, and the option that it becomes.

    Attributes:
        kind: the field's type, without None.
    """

    field: dataclasses.Field[Any]
    kind: Any
    optional: bool
    help: str

    @property
    def flag(self) -> str:
        return f"--{self.field.name}"

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def is_dict(self) -> bool:
        return get_origin(self.kind) is dict

    def parameter(self) -> inspect.Parameter:
        """What typer makes the option from."""
        flags = f"{self.flag}/--no_{self.field.name}" if self.kind is bool else self.flag
        annotation: Any = self.kind
        default = self.field.default
        if get_origin(self.kind) is Literal:
            annotation = Enum(self.field.name, {v: v for v in get_args(self.kind)}, type=str)
            default = None if default is None else annotation(default)
        metavar = None
        if self.is_list or self.is_dict:
            annotation, metavar = str, "0,1,3|0-5" if self.is_list else '{"name": value}'
        info = typer.Option(flags, help=escape(self.help), metavar=metavar)
        return inspect.Parameter(
            self.field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[annotation | None if self.optional else annotation, info],
        )

    def read(self, value: Any) -> Any:
        """The field's value from what typer read."""
        if isinstance(value, Enum):
            return value.value
        if self.is_dict and value is not None:
            return names_and_values(self.flag, value)
        return whole_numbers(self.flag, value) if self.is_list and value is not None else value


def _options(made: Any) -> list[_Option]:
    types, documented = get_type_hints(made), field_help(made)
    found: list[_Option] = []
    for field in dataclasses.fields(made):
        kind = types[field.name]
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        (only,) = (part for part in parts if part is not type(None))
        found.append(_Option(field, only, len(parts) > 1, documented[field.name]))
    return found
