"""The `headway` command: what it is given is done by the module that COMMANDS names, the only one that is loaded."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

USAGE = """\
headway COMMAND ...

  recipes               the named sweeps, one line each
  sweep RECIPE ...      train a sweep, measure every head, write a report; run again to go on where it stopped
  status [SWEEP]        sweeps and searches in the ledger, or the members of one, or the points
  probe calibrate SWEEP step size and localisation for that, tried on one member
  probe llc SWEEP       learning coefficients of every head at the kept steps, and degrees of their potentials
  probe transfer SWEEP  finished members on another number or density of particles, without training
  analyze SWEEP         work out timescales again from the tables of the members that are done
  report SWEEP          write the report again from the last analysis
  compare A B           two sweeps or points side by side, and whether a difference is shown
  plan SWEEP            seeds needed to see an exponent or a difference, from this sweep's scatter
  export SWEEP DIR      all tables, curves, config, figures and report as a folder of plain files
  clean [SWEEP]         delete checkpoints that nobody needs, or old ones; says what, and asks first
  ui                    MLflow's pages on this machine, with a link to the comparison
  server                an MLflow server on this machine, for a cluster's workers
  search RECIPE ...     let Optuna look for the best values of any fields
  submit RECIPE ...     `sweep` as a job of a Ray cluster; `submit search RECIPE ...`: `search`
  jobs [JOB]            a cluster's jobs, or one followed
  stop JOB              stop a job; the ledger is told, the same sweep goes on later

`headway COMMAND --help` tells more. RECIPE is a name, module:function of your own package,
or the .json of a stored sweep; SWEEP is a name or an id."""

COMMANDS: Mapping[str, str] = {
    "sweep": "cluster.commands:sweep_command",
    "probe": "cluster.probe_commands:probe_command",
    "analyze": "cluster.commands:analyze_command",
    "report": "cluster.commands:report_command",
    "status": "cluster.commands:status_command",
    "compare": "cluster.compare_page:compare_command",
    "plan": "cluster.power:plan_command",
    "export": "cluster.export:export_command",
    "clean": "cluster.clean:clean_command",
    "recipes": "cluster.commands:recipes_command",
    "ui": "cluster.commands:ui_command",
    "server": "cluster.server:server_command",
    "search": "cluster.search:search_command",
    "submit": "cluster.jobs:submit_command",
    "jobs": "cluster.jobs:jobs_command",
    "stop": "cluster.jobs:stop_command",
}
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
GO_ON = ("sweep", "probe llc", "search")  # the others begin anew


def load(command: str) -> Callable[[Sequence[str], Console], int]:
    """The function of a command. ValueError for one that there is not."""
    if command not in COMMANDS:
        from cluster.encoding import require_known

        require_known(command, list(COMMANDS), "command")
    module, _, name = COMMANDS[command].partition(":")
    found: Callable[[Sequence[str], Console], int] = getattr(importlib.import_module(module), name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 1: some members failed; 2: bad input, nothing started; 130: interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"headway {version('headway')}")
        return 0
    command, *rest = arguments
    known = {command, " ".join(arguments[:2])} & set(GO_ON)
    try:
        return load(command)(rest, console)
    except ValueError as error:
        print(f"headway: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough (`headway ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in NO_DISK:
            raise
        goes_on = "; the same command goes on once that is mended" if known else ""
        print(f"headway: {error}{goes_on}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the ledger says what is done, the same command goes on from there" if known else ""
        print(f"headway: stopped{goes_on}", file=sys.stderr)
        return 130
    except Exception as error:
        if is_a(error, "cluster.tracking", "BrokenOffError"):
            print(f"headway: {error}", file=sys.stderr)
        elif is_a(error, "optuna.exceptions", "StorageInternalError"):
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            print(f"headway: the study's database: {reason}; the same command goes on later", file=sys.stderr)
        elif is_a(error, "mlflow.exceptions", "MlflowException"):
            print(f"headway: MLflow: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            raise
        return 1


def is_a(error: Exception, module: str, name: str) -> bool:
    """Whether an error is of a class of a module, which is not loaded for this."""
    known = sys.modules.get(module)
    return known is not None and isinstance(error, getattr(known, name))


if __name__ == "__main__":
    sys.exit(main())
