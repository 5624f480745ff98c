"""The command line: `python -m experiments` runs the main job, `--help` lists all commands."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Any, get_type_hints

GOES_ON = "the same command goes on from what is stored."
INTERRUPTED = f"Interrupted; {GOES_ON}"


def _end_at_once(*_: Any) -> None:
    """Ends the command while nothing is open yet, without a traceback out of some import."""
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


if __name__ == "__main__":  # the imports below take seconds
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)

from rich.console import Console  # noqa: E402

from ewc_plugin.penalty.stability import DivergedError  # noqa: E402
from experiments.command_line import parse, print_completion, unknown, write_ascii_if_needed  # noqa: E402
from experiments.settings.grids import Main, PermutedMnist, SplitMnist, Sweep  # noqa: E402
from experiments.settings.values import shown  # noqa: E402
from experiments.sweeps import exit_status  # noqa: E402

# Warnings to silence: a solver that only GEM needs; evaluators without loggers.
AVALANCHE_NOTES = ("no QP solver found", "No loggers specified")
JOBS = {kind.name: kind for kind in (Main, SplitMnist, PermutedMnist, Sweep)}
# Commands of their own modules, each with `run(settings)`; imported only when they are called.
STUDIES = {
    "tune": "choose lambda on validation images, by a search that stops by itself",
    "compare": "which method of a results folder is better, by how much, with what interval",
    "report": "one HTML page about results folders",
    "table": "print a results folder's summary as markdown, LaTeX or CSV",
    "parity": "ours beside Avalanche's EWC: whole runs, paired seeds, curves over lambda",
    "drop-in": "DiagonalEWC beside Avalanche's EWC at the lambda that was found for the latter",
    "factorial": "importances by what they are made of: labels, what is squared, scale, loss",
    "reproduce": "a published experiment and whether its number comes out",
    "sweep-speed": "seconds per run, beside Avalanche's EWC and a plain loop",
    "fisher-speed": "time, memory and error of the Fisher, beside its peers",
    "penalty-speed": "what the penalty costs per step, beside Avalanche's",
    "implicit-step": "the implicit penalty step over six orders of magnitude of lambda",
    "normalized-lambda": "whether one lambda serves for F divided by its mean",
    "lambda-translation": "how a lambda reads under each Fisher type",
    "between-classes": "the parts of the Fisher between and within classes, task by task",
    "importance": "which layers and pixels carry the Fisher",
    "demonstration": "the plain loop: SGD against EWC on three tasks, without Avalanche",
    "identities": "the three definitions of Fisher information, while networks train",
    "laplace": "EWC beside the true posterior, on problems of two parameters",
}
# Where a command's module is; the others are in `studies`, under their own name.
MODULES = {
    "compare": "reporting.compare",
    "demonstration": "studies.demonstration.study",
    "report": "reporting.html.page",
    "table": "reporting.text_table",
    "parity": "studies.parity.study",
    "reproduce": "studies.reproduce.study",
    "sweep-speed": "timing.sweep_speed",
    "fisher-speed": "timing.fisher_speed",
    "penalty-speed": "timing.penalty_speed",
    "identities": "studies.fisher_definitions",
    "laplace": "studies.laplace.study",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, io.StringIO())
    if os.environ.get("COLUMNS", "80").strip() in map(str, range(20)):  # 0: nobody knows
        del os.environ["COLUMNS"]  # rich would print nothing, or have no room for a box
    errors = Console(stderr=True)
    for message in AVALANCHE_NOTES:
        warnings.filterwarnings("ignore", message=message)
    # The same in the worker processes.
    os.environ["PYTHONWARNINGS"] = ",".join(f"ignore:{message}" for message in AVALANCHE_NOTES)
    for stream in (sys.stdout, sys.stderr):
        write_ascii_if_needed(stream)
    try:
        stop = _run(arguments)
        sys.stdout.flush()  # here rather than when Python ends: its disk may be full
    except KeyboardInterrupt as stop:
        errors.print(INTERRUPTED, soft_wrap=True)
        return 128 + next(iter(stop.args), signal.SIGINT)
    except (ValueError, ChildProcessError, DivergedError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except OSError as error:
        _let_go(sys.stdout)
        if isinstance(error, BrokenPipeError):  # to `head`, say; workers' pipes are theirs
            return 128 + getattr(signal, "SIGPIPE", 13)
        path = error.filename2 or error.filename  # of a rename: where to
        where = f" {shown(str(path))}" if path else ""
        line = f"error: {error.strerror or error}{where}; {GOES_ON}"
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
        return 2
    finally:
        failures = exit_status.last_line()
    if failures:
        errors.print(failures, markup=False, highlight=False, soft_wrap=True)
    return stop or int(bool(failures))


def _let_go(stream: Any) -> None:
    """Let what a stream still holds go nowhere if it can't be written to."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> int:
    """Run the command; return the exit code of one that only prints, such as --help."""
    try:
        _run_command(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _run_command(arguments: list[str]) -> None:
    try:
        os.getcwd()  # as imports do
    except FileNotFoundError:
        raise ValueError("The current folder was deleted; change to one that is there.") from None
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments and arguments[0] == "--tyro-print-completion":
        print_completion({**JOBS, **{name: _study(name)[1] for name in STUDIES}}, arguments)
    # Options without a command belong to the main job.
    given = bool(arguments) and not arguments[0].startswith("-")
    name, *rest = arguments if given else ["main", *arguments]
    if name in JOBS:
        job: Any = parse(name, JOBS[name], rest, JOBS[name].__doc__)
        from experiments.main_job import run_job  # after --help and errors, which it would delay

        run_job(job, Console(quiet=job.quiet))
    elif name in STUDIES:
        module, kind = _study(name)
        module.run(parse(name, kind, rest, module.__doc__))
    else:
        raise unknown(name, "a command", [*JOBS, *STUDIES])


def _study(name: str) -> tuple[Any, type]:
    """The module of a command, and the dataclass of its settings."""
    path = MODULES.get(name, f"studies.{name}".replace("-", "_"))
    module = import_module(f"experiments.{path}")
    return module, get_type_hints(module.run)["settings"]


def _help() -> str:
    jobs = {name: str(kind.__doc__).splitlines()[0] for name, kind in JOBS.items()}
    lines = [f"  {name:18}  {what}" for name, what in {**jobs, **STUDIES}.items()]
    usage = "usage: python -m experiments [COMMAND] [OPTIONS]; each command has its own --help"
    completion = "Completion of commands and options: --tyro-print-completion bash, zsh or tcsh."
    return "\n".join([usage, "", str(__doc__), "", *lines, "", completion])


def _interrupt_once(number: int, *_: Any) -> None:
    """Stop at the first Ctrl-C or SIGTERM; ignore further ones while the command shuts down."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt_once)
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, _interrupt_once)
    sys.exit(main())
