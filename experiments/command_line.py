"""A command's settings from its options and from the TOML file that `--config` names."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import io
import itertools
import re
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

from experiments.settings.values import check_value, check_values, hints_of, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTION = re.compile(r"--(?:no-)?([A-Za-z][^=]*)")  # which a negative number is not
RENAMED = {"jobs": "processes"}  # options of the release before: their new names


def parse(command: str, kind: type, arguments: list[str], description: str | None) -> Any:
    """The settings of a command.

    Args:
        command: Its name.
        kind: The dataclass of its settings.
        arguments: Of the command line, without the command.
        description: Of the command, for --help.

    Returns:
        An instance of `kind`, checked.

    Raises:
        ValueError: An option is not known or comes twice, a value is not allowed, or the file can't
            be read.
        SystemExit: After --help.
    """
    given = [match[1].replace("_", "-") for a in arguments if (match := OPTION.match(a))]
    for option in given:
        if option in RENAMED and option not in hints_of(kind):
            raise ValueError(f"`--{option}` is now called `--{RENAMED[option]}`.")
        if given.count(option) > 1:
            raise ValueError(f"`--{option}` must be given once, got {given.count(option)} times.")
    file = _value_of("--config", arguments)
    default = {"default": kind(**_read(Path(file), command, kind))} if file else {}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            settings = tyro.cli(
                kind,
                prog=f"python -m experiments {command}",
                description=description,
                args=arguments,
                config=(tyro.conf.EnumChoicesFromValues,),
                **default,
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_one_line(printed.getvalue())) from None
        raise
    check_values(settings)
    return settings


def _one_line(box: str) -> str:
    """Return the parser's error message on one line, with the suggested options."""
    _, *lines = [line.strip(" │╭╮╰╯|+") for line in box.strip().splitlines()]
    body = itertools.dropwhile(_is_rule, lines)
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
    near = [match[0] for line in lines if (match := re.match(r"--\w[\w-]*", line))]
    hint = f"; did you mean {near[0]}?" if near and "Perhaps you meant:" in lines else ""
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", message) + hint


def _is_rule(line: str) -> bool:
    return not line.strip("─-")


def unknown(name: str, what: str, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not valid, with the nearest one that is."""
    near = difflib.get_close_matches(name, valid := list(valid), n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(valid)}."
    return ValueError(f"`{shown(name)}` is not {what}; {remedy}")


ASCII = {"±": "+-", "λ": "lambda", "θ": "theta", "·": "*", "−": "-", "…": "...", "≤": "<="}
ASCII |= (
    dict.fromkeys("─━╸╺╌", "-") | dict.fromkeys("│┃", "|") | dict.fromkeys("╭╮╰╯┏┓┗┛┡┩┳┴╇", "+")
)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end


def write_ascii_if_needed(stream: Any) -> None:
    """Let a stream that can't take "λ" or "±", such as a redirected console, get plain letters.

    A stream that encodes nothing, such as `io.StringIO`, takes every letter and stays as it is.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        "λ±─".encode(stream.encoding)
    except (UnicodeEncodeError, LookupError):
        codecs.register_error("ewc-ascii", _in_ascii)
        stream.reconfigure(errors="ewc-ascii")


def _value_of(option: str, arguments: list[str]) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.partition("=")[0] == option:
            return argument.partition("=")[2] or following
    return None


def _read(file: Path, command: str, kind: type) -> dict[str, Any]:
    """The settings in a TOML file, each of the type that the dataclass declares."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"`config` must be a readable TOML file, got {shown(str(file))} ({reason})."
        ) from None
    hints = {name: hint for name, hint in hints_of(kind).items() if name != "config"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise unknown(key, f"a setting of {command} (in {file})", hints)
        if name in values:
            raise ValueError(f"`{name}` must be given once in {file}, got both spellings.")
        values[name] = _typed(value, hints[name])
        check_value(f"`{key}` in {file}", values[name], hints[name])
    return values


def _typed(value: Any, hint: Any) -> Any:
    """A TOML value as the annotation has it: a list, or one value, for a tuple; enums by value."""
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list) else [value]
        return tuple(_typed(v, get_args(hint)[0]) for v in values)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next((member for member in hint if member.value == value), value)
    return float(value) if hint is float and type(value) is int else value
