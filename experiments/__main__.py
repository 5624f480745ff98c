"""The command line: `python -m experiments` runs the main job, `--help` lists the others."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, get_type_hints

import tyro
from rich.console import Console

from experiments.command_line import checked_arguments, parse, unknown
from experiments.settings.grids import Job, Main, PermutedMnist, SplitMnist, Sweep, Tune

# About a solver that only GEM needs, and of evaluators whose results are read directly.
AVALANCHE_NOTES = ("no QP solver found", "No loggers specified")

Command = (
    Annotated[Main, tyro.conf.subcommand("main")]
    | Annotated[SplitMnist, tyro.conf.subcommand("split-mnist")]
    | Annotated[PermutedMnist, tyro.conf.subcommand("permuted-mnist")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
)
JOBS = {kind.name: kind for kind in (Main, SplitMnist, PermutedMnist, Sweep, Tune)}
# Commands of their own modules, each with `run(settings)`; imported only when they are called.
STUDIES = {
    "report": "one HTML page about results folders, and its pictures for papers",
    "table": "print a results folder's summary as markdown, LaTeX or CSV",
    "parity": "ours beside Avalanche's built-in EWC: whole runs, paired seeds, curves over lambda",
    "reproduce": "a published experiment and whether its number comes out",
    "data-speed": "what the fast data path saves",
    "sweep-speed": "seconds per run and per sweep, beside Avalanche's EWC and a plain loop",
    "fisher-speed": "time, memory and error of the Fisher, beside its peers",
    "penalty-speed": "what the penalty costs per step, beside Avalanche's",
    "implicit-step": "the implicit penalty step over six orders of magnitude of lambda",
    "normalized-lambda": "whether one lambda serves for F divided by its mean",
    "lambda-translation": "how a lambda reads under each Fisher type",
    "importance": "which layers and pixels carry the Fisher",
    "demonstration": "the plain loop: SGD against EWC on three tasks, without Avalanche",
    "identities": "the three definitions of Fisher information, while networks train",
    "laplace": "EWC beside the true posterior, on problems of two parameters",
}
# Where a command's module is; the others are in `studies`, under their own name.
MODULES = {
    "report": "reporting.html.page",
    "table": "reporting.text_table",
    "parity": "studies.parity.study",
    "reproduce": "studies.reproduce.study",
    "data-speed": "timing.data_speed",
    "sweep-speed": "timing.sweep_speed",
    "fisher-speed": "timing.fisher_speed",
    "penalty-speed": "timing.penalty_speed",
    "identities": "studies.fisher_definitions",
    "laplace": "studies.laplace.study",
}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console, errors = Console(), Console(stderr=True)
    for message in AVALANCHE_NOTES:
        warnings.filterwarnings("ignore", message=message)
    # The same in the worker processes.
    os.environ["PYTHONWARNINGS"] = ",".join(f"ignore:{message}" for message in AVALANCHE_NOTES)
    try:
        if arguments and arguments[0] in STUDIES:
            _run_study(arguments[0], arguments[1:])
        else:
            _run_job(arguments, console)
    except KeyboardInterrupt:
        errors.print("Interrupted. Finished runs are stored; the same command goes on from there.")
        return 130
    except (ValueError, ChildProcessError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        line = f"error: {error.strerror or error}{where}; what was finished is stored."
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _run_job(arguments: list[str], console: Console) -> None:
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["main", *arguments]  # options without a command are the main job's
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
        if name not in JOBS:
            raise unknown(name, "a command", [*JOBS, *STUDIES])
        arguments = [name, *checked_arguments(name, JOBS[name], rest)]
    studies = "".join(f"\n    {name}: {what}" for name, what in STUDIES.items())
    job: Job = parse(
        Command,
        arguments,
        prog="python -m experiments",
        description=f"{__doc__}\n\nFurther commands (each with its own --help):{studies}",
        default=Main(),
    )
    from experiments.main_job import run_job  # after --help and errors, which need not wait for it

    console.quiet = job.quiet
    run_job(job, console)


def _run_study(name: str, arguments: list[str]) -> None:
    module = import_module(f"experiments.{MODULES.get(name, f'studies.{name}'.replace('-', '_'))}")
    kind = get_type_hints(module.run)["settings"]
    settings = parse(
        kind,
        checked_arguments(name, kind, arguments),
        prog=f"python -m experiments {name}",
        description=module.__doc__,
    )
    module.run(settings)


if __name__ == "__main__":
    sys.exit(main())
