"""The command line: `python -m experiments` runs the main job, `--help` lists the others."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import tyro
from rich.console import Console

from experiments.settings import Job, Main, PermutedMnist, SplitMnist, Tune

NO_SOLVER = "no QP solver found"

Command = (
    Annotated[Main, tyro.conf.subcommand("main")]
    | Annotated[SplitMnist, tyro.conf.subcommand("split-mnist")]
    | Annotated[PermutedMnist, tyro.conf.subcommand("permuted-mnist")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
)


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit code."""
    console, errors = Console(), Console(stderr=True)
    try:
        job: Job = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="python -m experiments",
            description=__doc__,
            default=Main(),
            args=arguments,
            config=(tyro.conf.EnumChoicesFromValues,),
        )
        # Avalanche's note about a solver that only GEM needs; here and in the worker processes.
        warnings.filterwarnings("ignore", message=NO_SOLVER)
        os.environ["PYTHONWARNINGS"] = f"ignore:{NO_SOLVER}"
        from experiments.jobs import run_job  # after --help and errors, which need not wait for it

        run_job(job, console)
    except KeyboardInterrupt:
        errors.print("Interrupted. Finished runs are stored; the same command goes on from there.")
        return 130
    except (ValueError, ChildProcessError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
