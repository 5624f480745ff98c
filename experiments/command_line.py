"""A command's settings from its options and from the TOML file that `--config` names."""

from __future__ import annotations

import ast
import codecs
import contextlib
import difflib
import inspect
import io
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import field as dataclass_field
from dataclasses import fields, is_dataclass, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import tyro

from experiments.settings.grids import fastest_device
from experiments.settings.values import check_value, check_values, hints_of, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTION = re.compile(r"--(?:no-)?([A-Za-z][^=]*)")  # which a negative number is not
RENAMED = {  # options of the release before: their new names
    "jobs": "processes",
    "importance": "ewc_lambda",
    "normalized_lambda": "ewc_lambda",
    "plain_lambda": "plain_ewc_lambda",
}
# Headings of --help, with the options below each; the others of a command come first.
GROUPS = {
    "benchmark": "benchmark scenario dataset data_root experiences pixels validation seeds"
    " eval_every",
    "training": "model hidden_size hidden_layers head dropout loss epochs batch_size optimizer"
    " learning_rate optimizer_state",
    "method": "methods fisher_type ewc_lambda tuned mode decay_factor normalize penalty_step memory"
    " importance_batch importance_order",
    "where_and_how": "out processes device force mix_code checkpoint dry_run config scheduler"
    " data_path quiet tensorboard wandb",
}
PARSING = (
    tyro.conf.EnumChoicesFromValues,
    tyro.conf.OmitArgPrefixes,  # groups are for --help alone
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
)
ALIASES = {"method": "methods"}  # where a command has the second and not the first


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
    arguments = [_without_alias(argument, kind) for argument in arguments]
    given = [match[1].replace("_", "-") for a in arguments if (match := OPTION.match(a))]
    for option in given:
        new = RENAMED.get(option.replace("-", "_"))
        if new in hints_of(kind) and option.replace("-", "_") not in hints_of(kind):
            raise ValueError(f"`--{option}` is now called `--{new.replace('_', '-')}`.")
        if given.count(option) > 1:
            raise ValueError(f"`--{option}` must be given once, got {given.count(option)} times.")
    file = _value_of("--config", arguments)
    grouped = _grouped(kind, {} if file is None else _read(file, command, kind))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                grouped,
                prog=f"python -m experiments {command}",
                description=description,
                args=list(_without_commas(arguments, kind)),
                config=PARSING,
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_one_line(printed.getvalue())) from None
        raise
    values = dict(_values(parsed))
    if values.get("device") == "auto":
        values["device"] = fastest_device()
    settings = kind(**values)
    check_values(settings)
    return settings


def print_completion(kinds: dict[str, type], arguments: list[str]) -> None:
    """Print a shell's completion script for all commands, under the name `experiments`.

    Args:
        kinds: The dataclass of each command's settings.
        arguments: `--tyro-print-completion` and a shell.
    """
    commands: Any = Union[  # noqa: UP007
        tuple(
            Annotated[_grouped(kind, {}), tyro.conf.subcommand(name)]
            for name, kind in kinds.items()
        )
    ]
    tyro.cli(commands, prog="experiments", args=arguments, config=PARSING)


def _grouped(kind: type, given: dict[str, Any]) -> Any:
    """A dataclass with a nested one for each of the `GROUPS` that a command has options of.

    Args:
        kind: The dataclass of the command's settings.
        given: Values that replace the defaults.
    """
    docs = _field_docs(kind)
    options = {}
    for one in fields(kind):
        text = tyro.conf.arg(help=docs.get(one.name, ""), help_behavior_hint=_default_text)
        default = given.get(one.name, one.default)
        hint: Any = Annotated[hints_of(kind)[one.name], text]
        options[one.name] = (one.name, hint, dataclass_field(default=default))
    nested = []
    for group, names in GROUPS.items():
        if members := [options.pop(name) for name in names.split() if name in options]:
            made: Any = make_dataclass(group, members)
            heading = Annotated[made, tyro.conf.arg(help="")]
            nested.append((group, heading, dataclass_field(default_factory=made)))
    return make_dataclass(kind.__name__, [*options.values(), *nested])


def _values(parsed: Any) -> Iterator[tuple[str, Any]]:
    for one in fields(parsed):
        value = getattr(parsed, one.name)
        yield from _values(value) if is_dataclass(value) else [(one.name, value)]


def _field_docs(kind: type) -> dict[str, str]:
    """The sentence below each field of a dataclass and its bases, by the field's name."""
    docs = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(defined, ast.ClassDef)
        for statement, below in itertools.pairwise(defined.body):
            match statement, below:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _default_text(default: str) -> str:
    return "" if default in ("", "None", "False") else f"(default: {default})"


def _without_commas(arguments: Iterable[str], kind: type) -> Iterator[str]:
    """The arguments, with `1,2` as `1 2` after an option that takes a list."""
    hints, is_list = hints_of(kind), False
    for argument in arguments:
        option, equals, values = argument.partition("=")
        if match := OPTION.match(option):
            is_list = get_origin(hints.get(match[1].replace("-", "_"))) is tuple
            if not (is_list and equals):
                yield argument
                continue
            yield option
            argument = values
        yield from argument.split(",") if is_list else [argument]


def _without_alias(argument: str, kind: type) -> str:
    option, equals, value = argument.partition("=")
    name = _setting(option.removeprefix("--"), kind) if option.startswith("--") else ""
    return f"--{name}{equals}{value}" if option.removeprefix("--") in ALIASES else argument


def _setting(name: str, kind: type) -> str:
    """The name of a setting for one of its names."""
    return ALIASES[name] if name in ALIASES and name not in hints_of(kind) else name


# A parser's message on an option of one number, and of several.
_NOT_A_NUMBER = re.compile(
    r"Error parsing (--\S+): (?:invalid literal for int\(\) with base 10|"
    r"could not convert string to float|Could not find valid parse for arguments): (.*)"
)


def _one_line(box: str) -> str:
    """Return the parser's error message on one line, with the suggested options."""
    _, *lines = [line.strip(" │╭╮╰╯|+") for line in box.strip().splitlines()]
    body = itertools.dropwhile(_is_rule, lines)
    message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), body))
    if match := _NOT_A_NUMBER.match(message):
        option, got = match[1], match[2]
        is_whole = any(line.startswith(f"{option} ") and "INT" in line for line in lines)
        what = "a whole number" if is_whole else "a number"
        message = f"`{option}` must be {what}{' or several' * got.startswith('[')}, got {got}."
    near = [match[0] for line in lines if (match := re.match(r"--\w[\w-]*", line))]
    message = message.replace("'None', ", "")  # what a file's missing entry means
    hint = f"; did you mean {near[0]}?" if near and "Perhaps you meant:" in lines else ""
    message = re.sub(r"^Error parsing [A-Z]\w*: ", "", message) + hint
    return message if len(message) <= 800 else f"{message[:400]} ... {message[-400:]}"


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
    for argument, following in zip(arguments, [*arguments, None][1:], strict=True):
        name, given, value = argument.partition("=")
        if name == option:
            return value if given else following
    return None


def _read(file: str, command: str, kind: type) -> dict[str, Any]:
    """The settings in a TOML file, each of the type that the dataclass declares."""
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"`config` must be a readable TOML file, got {shown(file)} ({reason})."
        ) from None
    hints = {name: hint for name, hint in hints_of(kind).items() if name != "config"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = _setting(key.replace("-", "_"), kind)
        if name not in hints:
            raise unknown(key, f"a setting of {command} (in {shown(file)})", hints)
        if name in values:
            raise ValueError(f"`{name}` must be given once in {shown(file)}, got both spellings.")
        values[name] = _typed(value, hints[name])
        check_value(f"`{key}` in {shown(file)}", values[name], hints[name])
    return values


def _typed(value: Any, hint: Any) -> Any:
    """A TOML value as the annotation has it: a list, or one value, for a tuple; enums by value."""
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list) else [value]
        return tuple(_typed(v, get_args(hint)[0]) for v in values)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next((member for member in hint if member.value == value), value)
    return float(value) if hint is float and type(value) is int else value
