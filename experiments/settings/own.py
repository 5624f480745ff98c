"""Functions in files of the user's own, in the place of a benchmark, network or method by name.

A setting `FILE.py:FUNCTION` names one. What a run's settings keep of it is the file's name without
its folders, the function, and the file's SHA-256: the same file elsewhere is the same run, and a
changed file is another.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.settings.values import shown

# The arguments that a function may name, by setting; those that are options have no defaults.
GIVEN = {
    "benchmark": ("seed",),
    "model": ("n_classes", "benchmark"),
    "method": ("n_classes", "benchmark"),
}
OPTIONS = {
    "benchmark": ("n_experiences", "validation"),
    "model": ("hidden_size", "hidden_layers", "dropout"),
    "method": ("ewc_lambda", "mode", "decay_factor", "fisher_type", "normalize", "memory"),
}


@dataclass(frozen=True)
class OwnFile:
    """A file and its content.

    Attributes:
        path: Absolute.
        sha256: Of its bytes, in hexadecimal.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class OwnFunction:
    """A function in a file.

    Attributes:
        setting: What it stands for: `benchmark`, `model` or `method`.
        file: Its file.
        function: Its name.
    """

    setting: str
    file: OwnFile
    function: str

    @property
    def name(self) -> str:
        """Its name in the tables: the file without its folders, and the function."""
        return f"{Path(self.file.path).name}:{self.function}"

    @property
    def parameters(self) -> Collection[str]:
        """The names of its arguments that a run fills in.

        Raises:
            ValueError: It can't be had, has an argument that no run fills in, or a default for one
                that is an option.
        """
        given, options = GIVEN[self.setting], OPTIONS[self.setting]
        found = []
        for parameter in _signature(self):
            known = parameter.name in (*given, *options)
            has_default = parameter.default is not parameter.empty
            if parameter.name in options and has_default:
                raise self.error(
                    f"have no default for `{parameter.name}`, whose value is that of the option"
                )
            if known and parameter.kind is not parameter.POSITIONAL_ONLY:
                found.append(parameter.name)
            elif not has_default:
                raise self.error(
                    f"have arguments of the names {', '.join((*given, *options))} alone, or with "
                    f"defaults, not `{parameter.name}`"
                )
        return found

    def __call__(self, **values: Any) -> Any:
        """Call the function with those of the values that it has arguments for.

        Raises:
            ValueError: It can't be had, or raises an error.
        """
        given = {name: values[name] for name in self.parameters}
        try:
            return _function(self)(**given)
        except (Exception, SystemExit) as error:
            raise self.error(f"run on {_plain(given)}", error) from error

    def error(self, rule: str, cause: BaseException | str = "") -> ValueError:
        """The error of a function that does not what it must."""
        reason = f": {_reason(cause)}" if isinstance(cause, BaseException) else cause
        return ValueError(f"`{self.setting}` {self.name} must {rule}{reason}.")


def find_function(setting: str, value: str) -> OwnFunction:
    """The function that the value of a setting names.

    Args:
        setting: `benchmark`, `model` or `method`.
        value: `FILE.py:FUNCTION`; the file as seen from the working directory, or below "~".

    Returns:
        The function; that it exists is not known yet.

    Raises:
        ValueError: The file can't be read.
    """
    path, _, function = value.rpartition(":")
    try:
        absolute = Path(path).expanduser().resolve()
        sha256 = hashlib.sha256(absolute.read_bytes()).hexdigest()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"`{setting}` must be a function in a file that can be read, got {value} ({reason})."
        ) from None
    return OwnFunction(setting, OwnFile(str(absolute), sha256), function)


def function_of(
    setting: str, name: str, sha256: str | None, files: Sequence[OwnFile]
) -> OwnFunction:
    """The function that a run's settings name.

    Args:
        setting: `benchmark`, `model` or `method`.
        name: `FILE.py:FUNCTION` without folders.
        sha256: Of the file.
        files: The files of the command.

    Returns:
        The function.

    Raises:
        ValueError: The command has no such file.
    """
    for file in files:
        if file.sha256 == sha256:
            return OwnFunction(setting, file, name.rpartition(":")[2])
    raise ValueError(f"`{setting}` must be a file of this command, got {name} ({sha256}).")


def changed_file(files: Sequence[OwnFile]) -> str:
    """A sentence on the first file that this machine lacks, or has otherwise; "" without one."""
    for file in files:
        try:
            _content(file)
        except ValueError as error:
            return str(error)
    return ""


def _content(file: OwnFile) -> bytes:
    """The bytes of a file, which are those of its hash."""
    try:
        content = Path(file.path).read_bytes()
    except OSError as error:
        raise ValueError(f"{file.path} can't be read here ({error.strerror})") from None
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise ValueError(
            f"{file.path} is not the file that the command began with: its SHA-256 begins with "
            f"{found[:8]}, not {file.sha256[:8]}"
        )
    return content


@functools.cache
def _module(file: OwnFile) -> ModuleType:
    """The module of a file, run once."""
    module = ModuleType(f"own_{file.sha256}")
    module.__file__ = file.path
    sys.modules[module.__name__] = module  # where classes look for their module
    exec(compile(_content(file), file.path, "exec"), vars(module))
    return module


def _function(own: OwnFunction) -> Callable[..., Any]:
    try:
        module = _module(own.file)
    except SyntaxError as error:
        where = f" (line {error.lineno}: {error.msg})"
        raise own.error("be in a file of Python code", where) from None
    except (Exception, SystemExit) as error:
        raise own.error("be in a file that can be imported", error) from error
    found = getattr(module, own.function, None)
    if not callable(found):
        names = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__  # not imported
        ]
        near = difflib.get_close_matches(own.function, names, n=1, cutoff=0.5)
        hint = f", as {near[0]} is" if near else f", which has {', '.join(names) or 'none'}"
        raise own.error("be a function in that file", hint)
    function: Callable[..., Any] = found
    return function


def _signature(own: OwnFunction) -> list[inspect.Parameter]:
    """The parameters of a function, without those that take any number of arguments."""
    try:
        parameters = inspect.signature(_function(own)).parameters.values()
    except TypeError as error:
        raise own.error("have a signature", error) from None
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter for parameter in parameters if parameter.kind not in any_number]


def _plain(values: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in values.items() if v is None or isinstance(v, (str, int, float))}
    return ", ".join(f"{k}={v!r}" for k, v in plain.items()) or "its arguments"


def _reason(error: BaseException) -> str:
    """An error in one line."""
    text = shown(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
