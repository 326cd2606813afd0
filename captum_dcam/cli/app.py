r"""The program ``captum-dcam``: its commands, and how errors are shown.

Exit codes: 0 done; 2 wrong usage, or what this library refuses
(:class:`captum_dcam.errors.DcamError`), with one line that says what; 3 a doctor's report that says
stop; 1 a bug of this program, with a hint how to see and report it; 128 and the signal's number
where a signal ended it with work left.
``--debug`` shows the whole traceback of both kinds of errors.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from captum_dcam import __version__, cli
from captum_dcam.cli.options import COMMANDS, DEBUG, Command, Shown, WrongUsage, debug_option
from captum_dcam.cli.printing import say_on_stderr
from captum_dcam.errors import DcamError, EvaluationError
from captum_dcam.shown import harmless

#: the commands that the help shows first, in this order
FIRST = (
    "explain",
    "compare",
    "compare_models",
    "view",
    "models",
    "doctor",
    "evaluate",
    "table",
    "calibrate",
)


class Program(TyperGroup):
    """Commands whose refusals are one line on stderr and exit code 2, whichever command it was."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except (DcamError, RuntimeError) as error:
            if not _is_refusal(error):
                raise
            if Shown.of(context).debug:
                _print_traceback(error)
            typer.secho("Error: ", fg="red", bold=True, err=True, nl=False)
            say_on_stderr(" ".join(str(error).splitlines()))
            raise typer.Exit(2) from error
        except WrongUsage as error:
            error.message = harmless(error.message)  # type: ignore[attr-defined]  # as it was typed
            raise


def _print_traceback(error: BaseException) -> None:
    say_on_stderr("".join(traceback.format_exception(error)))


def _is_refusal(error: Exception) -> bool:
    """Whether the user can mend it: what this library refuses, or a device without more memory.

    An image that could not be measured counts as the error that made it fail.
    """
    cause = error.__cause__ if isinstance(error, EvaluationError) else None
    first = error if cause is None else cause
    full = any(kind.__name__ == "OutOfMemoryError" for kind in type(first).__mro__)  # torch's
    return full or isinstance(first, DcamError if cause is None else DcamError | OSError)


app = typer.Typer(
    cls=Program,
    name="captum-dcam",
    help="Which image regions made a masked-diffusion multimodal LLM write which words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"captum-dcam {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, debug_option(envvar=DEBUG)] = False,
) -> None:
    pass


for found in iter_modules(cli.__path__, f"{cli.__name__}."):
    import_module(found.name)  # a file of a command enters it
for name in dict.fromkeys((*FIRST, *COMMANDS)):
    app.command(name.replace("_", "-"), cls=Command)(COMMANDS[name])


def _end(number: int, _frame: Any) -> None:
    """End as an error would, so that nothing half written is left."""
    sys.exit(128 + number)


def main() -> None:
    """Entry point of ``captum-dcam``."""
    # before torch is imported: threads that spin while they wait for one another are many times
    # slower beside a busy core
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in ("SIGTERM", "SIGHUP"):
        kind = getattr(signal, name, None)
        if kind is not None and signal.getsignal(kind) is signal.SIG_DFL:
            signal.signal(kind, _end)
    shown = Shown()
    try:
        app(prog_name="captum-dcam", obj=shown)
    except Exception as error:  # noqa: BLE001  the top of the program: a bug is shown and reported
        if shown.debug:
            _print_traceback(error)
        what = " ".join(str(error).split()) or "no message"
        typer.secho("Bug: ", fg="red", bold=True, err=True, nl=False)
        say_on_stderr(
            f"this is an error of the program, not yours: {type(error).__name__} ({what}).\n"
            f"Run again with --debug, or {DEBUG}=1, for the whole traceback, and please report it."
        )
        sys.exit(1)
