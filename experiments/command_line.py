"""A command's arguments, and those of the TOML file that they may name, checked and in one list.

What is misspelt is said in one line with the nearest valid name, before the parser sees it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTION = re.compile(r"--[A-Za-z]")  # which a negative number is not


def checked_arguments(command: str, settings: type, arguments: list[str]) -> list[str]:
    """The arguments, after those of the `--config` file, which count less.

    Args:
        command: Its name, for messages.
        settings: The dataclass that the arguments are parsed into.
        arguments: Of the command line, without the command.

    Returns:
        Arguments for the parser; options and choices are valid ones.

    Raises:
        ValueError: An option or a choice is not valid, or the file can't be read.
    """
    hints = get_type_hints(settings)
    valid = {field.name.replace("_", "-"): hints[field.name] for field in fields(settings)}
    _check(command, valid, arguments)
    given = [values for option, values in _options(arguments) if option == "config" and values]
    if not given:
        return arguments
    (file, *_) = given[-1]
    from_file = list(_from_file(file, command, valid))
    _check(command, valid, from_file)
    return [*from_file, *arguments]


def parse(kind: Any, arguments: list[str], **options: Any) -> Any:
    """What the parser makes of arguments, whose errors become one line.

    Args:
        kind: Dataclass, or union of such.
        arguments: To parse.
        options: Of `tyro.cli`.

    Returns:
        An instance of `kind`.

    Raises:
        ValueError: An argument is not valid.
    """
    printed = io.StringIO()
    config = (tyro.conf.EnumChoicesFromValues,)
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=arguments, config=config, **options)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        raise ValueError(_out_of_its_box(printed.getvalue())) from None


def _out_of_its_box(text: str) -> str:
    """The first paragraph of a framed message with a title."""
    _, *lines = [line.strip(" │╭╮╰╯") for line in text.strip().splitlines()]
    paragraphs = groupby(lines, key=lambda line: bool(line.strip("─-")))  # else it is a rule
    first = next((list(some) for is_text, some in paragraphs if is_text), [text])
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", " ".join(first))


def unknown(name: str, what: str, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not valid, with the nearest one that is."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(valid)}."
    return ValueError(f"`{name}` is not {what}; {remedy}")


def _options(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option's name, without dashes in front, with the values after it."""
    option, values = "", []
    for argument in arguments:
        if OPTION.match(argument):
            yield option, values
            option, equals, value = argument[2:].partition("=")
            option, values = option.replace("_", "-"), [value] if equals else []
        else:
            values.append(argument)
    yield option, values


def _check(command: str, valid: dict[str, Any], arguments: list[str]) -> None:
    for option, values in _options(arguments):
        if not option or option == "help" or option.startswith("tyro-"):
            continue
        name = option if option in valid else option.removeprefix("no-")
        if name not in valid:
            options = [f"--{name}" for name in valid]
            raise unknown(f"--{option}", f"an option of {command}", options)
        several, choices = _choices(valid[name])
        for value in values if several else values[:1]:
            if choices and value not in choices:
                raise unknown(value, f"a value of --{option}", choices)


def _choices(hint: Any) -> tuple[bool, list[str]]:
    """Whether a field takes several values, and the only ones that it takes; none: any."""
    several = get_origin(hint) is tuple
    hint = get_args(hint)[0] if several else hint
    choices = []
    for kind in [hint, *get_args(hint)]:  # a literal, or one beside None
        if get_origin(kind) is Literal:
            choices += [str(value) for value in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [str(member.value) for member in kind]
    return several, choices


def _from_file(file: str, command: str, valid: dict[str, Any]) -> Iterator[str]:
    """The settings in a TOML file as arguments."""
    try:
        settings = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"`config` must be a readable TOML file, got {file} ({reason}).") from None
    names = [name.replace("-", "_") for name in valid if name != "config"]
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in names:
            raise unknown(key, f"a setting of {command} (in {file})", names)
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield option if value else option.replace("--", "--no-", 1)
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, (str, int, float)) for v in values):
            rule = "a string, a number, true, false or a list of such"
            raise ValueError(f"`{key}` in {file} must be {rule}, got {value}.")
        yield option
        yield from map(str, values)
