"""A run's figures for TensorBoard, and for MLflow and Weights & Biases where settings ask for them.

One run there per pretraining, kept up by its first worker. None of them can stop a training or hold it up: files are
written as far as they can be, and what goes to a server is sent by a thread, which tries again after every epoch.
`tracking.json` in the run's folder tells which runs they are and up to which epoch they know it, so that a resumed
pretraining goes on in the same ones.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from amlp_ray.config.tracking import TrackingConfig
from amlp_ray.errors import ConfigError
from amlp_ray.training.loggers.remote import LoggerState, MLflow, RemoteLogger, Run, WandB

Say = Callable[[str], None]

# Set before their import. What the user has set himself is left as it is.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves a hospital's network unasked
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the next epoch tries again; seven in a row take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",  # it would draw into the progress line, and ask for a key at a prompt
}


class Logger(Protocol):
    """Where a run's figures go."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """An epoch's metrics: those that are finite numbers, at step `metrics["epoch"]`."""
        ...

    def close(self, failed: bool = False) -> None:
        """The run has ended here; a later one may go on."""
        ...


def check_tracking(config: TrackingConfig) -> None:
    """Raise ConfigError where a package that the settings need is not installed."""
    for name in ("mlflow", "wandb"):
        if getattr(config, name) is not None and find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} is set, but {name} is not installed; pip install 'amlp-ray[{name}]'."
            )


def open_trackers(
    folder: Path,
    config: TrackingConfig,
    *,
    name: str,
    parameters: Mapping[str, Any],
    group: str = "",
    resumed_epoch: int = 0,
    say: Say = warnings.warn,
) -> Logger:
    """Begin to follow a run, or go on: TensorBoard always, servers where set.

    Args:
        folder: of the run; gets `tensorboard/` and, with servers, `tracking.json` (and `wandb/`).
        name: of the run. group: of its study, which is W&B's group and a tag in MLflow.
        parameters: by dotted name, without secrets.
        resumed_epoch: the last epoch of the checkpoint that the run goes on from.
        say: told once of each that fails, in one sentence.

    Raises:
        ConfigError: a package that the settings need is not installed.
    """
    check_tracking(config)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    run, kept = Run(name, group, parameters), LoggerState(folder / "tracking.json")
    following: list[TensorBoard | RemoteLogger] = [
        TensorBoard(folder / "tensorboard", resumed_epoch, say)
    ]
    if config.mlflow is not None:
        following.append(RemoteLogger(MLflow(config.mlflow, config.experiment, run, kept), say))
    if config.wandb is not None:
        following.append(RemoteLogger(WandB(config.wandb, folder, run, kept), say))
    return LoggerGroup(following)


class LoggerGroup:
    """TensorBoard and all servers as one tracker."""

    def __init__(self, following: list[TensorBoard | RemoteLogger]) -> None:
        self._following = following

    def log(self, metrics: Mapping[str, Any]) -> None:
        values = numbers_of(metrics)
        for one in self._following:
            one.log(metrics["epoch"], values)

    def close(self, failed: bool = False) -> None:
        for one in self._following:
            one.close(failed)


class TensorBoard:
    """Event files, one record per epoch.

    TensorBoardX's own `SummaryWriter` hands events to a thread through a queue of ten: where that thread dies of a full
    disk, the training would wait for ever. So records are written here, with its protocol buffers.
    """

    def __init__(self, folder: Path, resumed_epoch: int, say: Say) -> None:
        import tensorboardX  # noqa: F401  (now: in an epoch it would wait for what the senders' threads import)

        self._folder, self._say, self._told = folder, say, False
        self._next = (
            resumed_epoch + 1 if resumed_epoch else 0
        )  # 0: the random encoder is reported as such
        self._file: Any = None

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        event = Event(wall_time=time.time(), step=epoch, summary=Summary(value=points))
        try:
            if self._file is None:
                self._file = self._opened()
            self._file.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            self._file = None  # a half-written record ends a file: the next epoch begins another
            if not self._told:
                self._told = True
                self._say(
                    f"TensorBoard's files in {self._folder} cannot be written ({error.strerror}); training on."
                )
        else:
            self._next = epoch + 1

    def close(self, failed: bool = False) -> None:
        """Nothing is left to write; a file that is full cannot be closed without an error."""
        self._file = None

    def _opened(self) -> Any:
        """A new file, which says that steps from the next one on in older files are done again."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time()  # TensorBoard reads files in the order of their names
        file = RecordWriter(str(self._folder / f"events.out.tfevents.{now:.6f}.{os.getpid()}"))
        file.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        started = SessionLog(status=SessionLog.START)
        file.write(Event(wall_time=now, step=self._next, session_log=started).SerializeToString())
        return file


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of an epoch's metrics that are finite numbers, without the epoch itself.

    >>> numbers_of({"epoch": 2, "loss": 0.5, "dsc": float("nan"), "note": "x", "resumed": True})
    {'loss': 0.5}
    """
    plain = {
        k: v
        for k, v in metrics.items()
        if isinstance(v, Real) and not isinstance(v, bool) and k != "epoch"
    }
    return {key: float(value) for key, value in plain.items() if math.isfinite(value)}
