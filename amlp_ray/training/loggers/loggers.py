"""Log a run to TensorBoard, and to MLflow and Weights & Biases where configured.

Each pretraining has one run there, written by its first worker. No logger can stop a training or
slow it down: files are written as far as possible, and a thread sends to servers.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from amlp_ray.config.tracking import TrackingConfig
from amlp_ray.errors import ConfigError
from amlp_ray.training.loggers.remote import MLflowService, RemoteLogger, RunInfo, WandbService

# Set before the packages are imported. What the user has set stays.
ENVIRONMENT = {
    # Nothing leaves a hospital's network unasked.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The next epoch tries again; seven retries in a row take minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_ERROR_REPORTING": "false",
    # W&B would draw into the progress line, and ask for a key at a prompt.
    "WANDB_SILENT": "true",
}

logger = logging.getLogger(__name__)


def check_tracking(config: TrackingConfig) -> None:
    """Raise ConfigError if a package that the config needs is not installed."""
    for name in ("mlflow", "wandb"):
        if getattr(config, name) is not None and find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} is set, but {name} is not installed; "
                f"pip install 'amlp-ray[{name}]'."
            )


def open_loggers(
    folder: Path,
    config: TrackingConfig,
    *,
    name: str,
    parameters: Mapping[str, Any],
    group: str = "",
    resumed_epoch: int = 0,
) -> LoggerGroup:
    """Start to log a run, or resume it: always to TensorBoard, and to servers where configured.

    A logger that fails logs one warning.

    Args:
        folder: of the run; gets `tensorboard/` and, with servers, `tracking.json` (and `wandb/`).
        config: which servers.
        name: of the run.
        parameters: the config by dotted name, without secrets.
        group: name of the study, which is W&B's group and a tag in MLflow.
        resumed_epoch: the epoch of the checkpoint that the run resumes from.

    Raises:
        ConfigError: a package that the config needs is not installed.
    """
    check_tracking(config)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    run = RunInfo(folder, name, group, parameters)
    loggers: list[Logger] = [TensorBoardLogger(folder / "tensorboard", resumed_epoch)]
    if config.mlflow is not None:
        loggers.append(RemoteLogger(MLflowService(config.mlflow, config.experiment, run)))
    if config.wandb is not None:
        loggers.append(RemoteLogger(WandbService(config.wandb, run)))
    return LoggerGroup(loggers)


class LoggerGroup:
    """All loggers of a run as one."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log an epoch's metrics to all loggers; only finite numbers are logged."""
        values = finite_numbers(metrics)
        for each in self._loggers:
            each.log(metrics["epoch"], values)

    def close(self, failed: bool = False) -> None:
        """Close all loggers."""
        for each in self._loggers:
            each.close(failed)


class TensorBoardLogger:
    """Writes event files, one record per epoch.

    Records are written here with tensorboardX's protocol buffers. Its `SummaryWriter` passes events
    to a thread through a queue of ten: that thread dies of a full disk, and then `add_scalar` waits
    forever, and the training with it (measured).
    """

    def __init__(self, folder: Path, resumed_epoch: int) -> None:
        # Imported now: within an epoch it would wait for what the senders' threads import.
        import tensorboardX  # noqa: F401

        self._folder = folder
        self._file: Any = None
        self._has_warned = False
        # 0: the random encoder is reported as that epoch.
        self._next_epoch = resumed_epoch + 1 if resumed_epoch else 0

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = Event(wall_time=time.time(), step=epoch, summary=Summary(value=points))
        try:
            if self._file is None:
                self._file = self._open_file()
            self._file.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            # A half-written record ends a file; the next epoch begins another.
            self._file = None
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "TensorBoard files in %s cannot be written (%s); the training continues.",
                    self._folder,
                    error.strerror,
                )
        else:
            self._next_epoch = epoch + 1

    def close(self, failed: bool = False) -> None:
        """Drop the file. Records are flushed, and a full file cannot be closed without an error."""
        self._file = None

    def _open_file(self) -> Any:
        """Open a new file. It tells that later steps in older files are repeated."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time()  # TensorBoard reads files in the order of their names
        file = RecordWriter(str(self._folder / f"events.out.tfevents.{now:.6f}.{os.getpid()}"))
        version = Event(wall_time=now, file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        session = Event(wall_time=now, step=self._next_epoch, session_log=start)
        file.write(version.SerializeToString())
        file.write(session.SerializeToString())
        return file


Logger = TensorBoardLogger | RemoteLogger


def finite_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are finite numbers, without the epoch.

    >>> finite_numbers({"epoch": 2, "loss": 0.5, "dsc": float("nan"), "note": "x", "resumed": True})
    {'loss': 0.5}
    """
    numbers = {}
    for name, value in metrics.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if name != "epoch" and is_number and math.isfinite(value):
            numbers[name] = float(value)
    return numbers
