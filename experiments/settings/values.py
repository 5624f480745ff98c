"""Types and ranges of settings, declared in their annotations and checked strictly.

`epochs: Annotated[int, Between(1, 1000)]` takes neither True nor 2.0 nor 0. The rules for a setting
are the same wherever its value came from: the command line, a TOML file, a stored run.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

UNION_TYPES = {Union, type(int | None)}


@dataclass(frozen=True)
class Between:
    """The range of a number, in an `Annotated`.

    Attributes:
        low: Smallest value.
        high: Largest value.
        open_low: Whether `low` itself is refused.
        open_high: Whether `high` itself is refused.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f">= {self.low:g}"
        high = f"below {self.high:.10g}" if self.open_high else f"<= {self.high:.10g}"
        return f"{low} and {high}"


@dataclass(frozen=True)
class OneOf:
    """The values of an enum as plain strings, in an `Annotated`."""

    kind: type[Enum]

    def __contains__(self, value: str) -> bool:
        return value in [member.value for member in self.kind]

    def __str__(self) -> str:
        return ", ".join(str(member.value) for member in self.kind)


@dataclass(frozen=True)
class NameOrFile:
    """Names, or `FILE.py:FUNCTION` for a function of the user's own, in an `Annotated`.

    Attributes:
        names: The names.
    """

    names: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.names or is_own(value)

    def __str__(self) -> str:
        return f"{', '.join(self.names)}, FILE.py:FUNCTION"


def is_own(value: str) -> bool:
    """Whether a setting's value names a function in a file."""
    return re.fullmatch(r".+\.py:[^\W\d]\w*", value) is not None


Count = Annotated[int, Between(1, 10**6)]
CountOrNone = Annotated[int, Between(0, 10**6)]  # where 0 means none at all
Seed = Annotated[int, Between(0, 2**32 - 1)]
Positive = Annotated[float, Between(0, 1e6, open_low=True)]
Lambda = Annotated[float, Between(0, 1e30)]  # a larger one overflows float32 with any gradient
Processes = Annotated[int, Between(1, 1024)]


NAMES = (OneOf, NameOrFile)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def check_values(settings: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ValueError: Naming the first field whose value is not allowed, and what is. An empty list is
            allowed where it is the default.
    """
    for field in fields(settings):
        hint, value = hints_of(type(settings))[field.name], getattr(settings, field.name)
        check_value(f"`{field.name}`", value, hint)
        if value == () and field.default not in ((), MISSING):
            raise ValueError(f"`{field.name}` must be a non-empty list, got ().")


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check one value against an annotation; of a list, value by value.

    Raises:
        ValueError: It is not allowed.
    """
    if get_origin(hint) is tuple and type(value) is tuple:
        for one in value:
            check_value(name, one, get_args(hint)[0])
        if twice := [one for i, one in enumerate(value) if one in value[:i]]:
            raise ValueError(f"{name} must hold each value once, got {shown(twice[0])} twice.")
    elif not fits(value, hint):
        raise ValueError(f"{name} must be {allowed(hint)}, got {shown(value)}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether an annotation allows a value."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [m for m in arguments[1:] if isinstance(m, (Between, *NAMES))]
        return fits(value, arguments[0]) and all(value in some for some in ranges)
    if origin in UNION_TYPES:
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin is tuple:
        return type(value) is tuple and all(fits(v, arguments[0]) for v in value)
    if hint is float:
        return _number(value) and math.isfinite(value)
    if hint is None or hint is type(None):
        return value is None
    if issubclass(hint, Enum):
        return value in list(hint)  # a string enum's values, too
    if hint is str:
        return type(value) is str and value.strip() != ""
    return type(value) is hint if hint in _WORDS else isinstance(value, hint)


def allowed(hint: Any) -> str:
    """Return the values that an annotation allows, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [str(m) for m in arguments[1:] if isinstance(m, Between)]
        names = [f"one of {m}" for m in arguments[1:] if isinstance(m, NAMES)]
        return names[0] if names else ", ".join([allowed(arguments[0]), *ranges])
    if origin in UNION_TYPES:
        return " or ".join(allowed(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list, each value {allowed(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {OneOf(hint)}"
    return _WORDS.get(hint) or f"a {hint.__name__}"


def shown(value: Any) -> str:
    """A value for a message, not longer than a line."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _number(value: Any) -> bool:
    return type(value) in (int, float)


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string that is not empty",
    type(None): "unset",
    None: "unset",
}
