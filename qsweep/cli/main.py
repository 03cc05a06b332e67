"""`qsweep`: the commands. Each lives in a file of its own or beside its like, and imports what it needs when called."""

from __future__ import annotations

import errno
import shutil
import sys

import typer

from qsweep.cli import doctor, results, run, shipping, specs, ui
from qsweep.errors import QsweepError

app = typer.Typer(
    help="Find the compressed version of a PyTorch model to ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    run.run,
    specs.validate,
    specs.plan,
    specs.schema,
    results.front,
    results.best,
    shipping.promote,
    shipping.export,
    doctor.doctor,
    ui.ui,
):
    app.command()(command)


def main() -> None:
    """Run the command line. What qsweep raises on purpose, and a file that cannot be read or written, becomes one line
    and exit code 1."""
    try:
        app()
    except (QsweepError, OSError) as error:
        from qsweep.cli.console import say_error

        if (said := _said(error)) is None:
            raise  # no file of the user's: a fault of ours
        say_error(said)
        sys.exit(1)


def _said(error: QsweepError | OSError) -> str | None:
    if isinstance(error, QsweepError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or (
        isinstance(error, shutil.Error) and "No space left" in str(error)
    ):
        return f"no space left on the disk of {error.filename or 'what was to be written, or of TMPDIR'}"
    return f"`{error.filename}`: {error.strerror}" if error.filename is not None else None
