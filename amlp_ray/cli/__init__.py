"""The command line. Commands import what is heavy when they run, so that --help is fast."""

from __future__ import annotations

import errno
import signal
import sys
from types import FrameType
from typing import Annotated

import typer
from typer import Option

from amlp_ray.cli import data, method, study
from amlp_ray.cli.inspect import inspect
from amlp_ray.cli.output import log_to_stderr
from amlp_ray.cli.predict import predict
from amlp_ray.cli.pretrain import pretrain
from amlp_ray.cli.segment import segment
from amlp_ray.cli.settings import settings
from amlp_ray.errors import AmlpError

# Errors of a full disk, which a write raises without the name of the file.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(name="amlp-ray", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data.app, name="data")
app.command()(pretrain)
app.command()(inspect)
app.command()(segment)
app.command()(predict)
app.command()(settings)
app.add_typer(method.app, name="method")
app.add_typer(study.app, name="study")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"amlp-ray {version('amlp-ray')}")
        raise typer.Exit


# Not eager, so that --help is answered before typer imports pydantic to read the value.
Version = Annotated[bool, Option("--version", callback=_print_version, help="Print the version.")]


@app.callback()
def root(version: Version = False) -> None:
    """Pretrain AMLP on unlabeled medical images and search its settings on a Ray cluster."""


def main() -> None:
    """Run a command. Exit code 0: done, 1: failed, 2: invalid input, 130: Ctrl-C, 143: SIGTERM."""
    was_terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        # All commands handle Ctrl-C; a scheduler's SIGTERM is handled the same way.
        nonlocal was_terminated
        was_terminated = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        with log_to_stderr():
            app()
    except SystemExit as end:
        sys.exit(143 if was_terminated else end.code)
    except AmlpError as error:
        for message in error.messages:
            # The name of a file may hold a line break, but a message is one line.
            line = message.replace("\n", "\\n")
            print(f"amlp-ray: {line}", file=sys.stderr)
        sys.exit(143 if was_terminated else error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        file = f"{error.filename}: " if error.filename is not None else ""
        print(
            f"amlp-ray: {file}{error.strerror}; check the path, space and rights.", file=sys.stderr
        )
        sys.exit(2)
