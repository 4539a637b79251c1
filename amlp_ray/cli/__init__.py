"""The command line. Heavy imports wait until a command needs them, so that --help answers at once."""

from __future__ import annotations

import errno
import signal
import sys
from types import FrameType

import typer

from amlp_ray.cli import data, method, study
from amlp_ray.cli.inspect import inspect
from amlp_ray.cli.predict import predict
from amlp_ray.cli.pretrain import pretrain
from amlp_ray.cli.segment import segment
from amlp_ray.cli.settings import settings
from amlp_ray.errors import AmlpError

FULL = (errno.ENOSPC, errno.EDQUOT)  # which a write tells without a name

app = typer.Typer(
    name="amlp-ray",
    help="Pretrain AMLP on unlabelled medical images and search its settings on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.command()(pretrain)
app.command()(inspect)
app.command()(segment)
app.command()(predict)
app.command()(settings)
app.add_typer(method.app, name="method")
app.add_typer(study.app, name="study")


def main() -> None:
    """Run a command. Exit code 0: done, 1: failed, 2: invalid input, 130: Ctrl-C, 143: SIGTERM."""
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt  # a scheduler's notice is answered as Ctrl-C is: all commands bear that

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except SystemExit as ended:
        sys.exit(143 if terminated else ended.code)
    except AmlpError as error:
        for message in error.messages:
            sentence = message.replace(
                "\n", "\\n"
            )  # names of files may hold one; a sentence is one line
            print(f"amlp-ray: {sentence}", file=sys.stderr)
        sys.exit(143 if terminated else error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(
            f"amlp-ray: {where}{error.strerror}; check the path, space and rights.", file=sys.stderr
        )
        sys.exit(2)
