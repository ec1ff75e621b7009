"""Whether what a checkpoint holds of a control has the form that it was saved in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jumprelu_plugin.records import is_number

# What a control's state says where a version did not say it: the defaults of that version.
_EARLIER = {"ste_input_share": 1.0}


def with_earlier_defaults(state: Any) -> Any:
    """A control's state with what earlier versions did not say; what is no state stays."""
    return {**_EARLIER, **state} if isinstance(state, Mapping) else state


def checked_control_state(state: Any, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A control's state, with earlier defaults.

    Raises:
        ValueError: it has another form than `expected`, or its share is none.
    """
    state = with_earlier_defaults(state)
    require_same_form(state, expected)
    share = state["ste_input_share"]
    if not 0 <= share <= 1:
        raise ValueError(f"ste_input_share is {share}; expected a share")
    return state


def require_same_form(found: Any, expected: Any, name: str = "its state") -> None:
    """Refuse numbers, objects and lists that do not stand where `expected` has them.

    Args:
        found: as read from JSON.
        expected: the state of a control that has just been made. Where it is None, a number or an
            object will do too.

    Raises:
        ValueError: naming the field, what it holds and what is expected.
    """
    if expected is None:
        if not (found is None or is_number(found) or isinstance(found, Mapping)):
            raise ValueError(f"{name} is {found!r}; expected a number or null")
    elif isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is {found!r}; expected an object")
        missing = [key for key in expected if key not in found]
        if missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}")
        for key in expected:
            require_same_form(found[key], expected[key], f"{name}'s {key}")
    elif isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            raise ValueError(f"{name} is not a list of {len(expected)}")
        for index, value in enumerate(expected):
            require_same_form(found[index], value, f"{name}[{index}]")
    elif not is_number(found):
        raise ValueError(f"{name} is {found!r}; expected a number")


def require_same_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing or of another shape or kind.

    Raises:
        ValueError: naming the tensor, and both shapes.
    """
    for name, value in expected.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        other = found[name]
        if other.shape != value.shape or other.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"{name} is {other.dtype} {list(other.shape)}; expected {value.dtype} "
                f"{list(value.shape)}"
            )
