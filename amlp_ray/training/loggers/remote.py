"""Send a run's metrics to MLflow and Weights & Biases from a thread.

MLflow's own asynchronous logging and W&B's do not replace the thread: both block while a run is
created, and MLflow drops a batch whose request failed.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import read_json

# How long the end of a run waits for a server; one that answers takes 1 to 3 s.
CLOSE_S = 60.0
# The same, for a server that could not be reached before.
UNREACHABLE_CLOSE_S = 5.0

logger = logging.getLogger(__name__)


class EpochValues(NamedTuple):
    """An epoch's metrics by name."""

    epoch: int
    values: Mapping[str, float]


class RunInfo(NamedTuple):
    """What a server is told of a run; see `open_loggers`."""

    folder: Path
    name: str
    group: str
    parameters: Mapping[str, Any]


class Service(ABC):
    """A server that a run is sent to. Any method may raise anything.

    `tracking.json` in the run's folder has for each service its address, its run and the last epoch
    sent, so that a resumed run continues there.
    """

    name: str
    key: str  # in `tracking.json`
    _state_lock = threading.Lock()  # of all services

    def __init__(self, address: str, run: RunInfo) -> None:
        self._address = address
        self._run = run
        self._state_path = run.folder / "tracking.json"
        self._run_id = ""
        self._sent_epoch = -1

    @abstractmethod
    def open(self) -> None:
        """Create a run, or resume the recorded one."""

    def send(self, epoch: int, values: Mapping[str, float]) -> None:
        """Send the metrics of an epoch, unless they were sent before a kill."""
        if epoch > self._sent_epoch:
            self._send(epoch, values)
            self._record(epoch)

    @abstractmethod
    def _send(self, epoch: int, values: Mapping[str, float]) -> None:
        """Send metrics that were not sent before."""

    @abstractmethod
    def end(self, failed: bool) -> None:
        """End the run."""

    def _read_record(self) -> None:
        """Find the run and the last epoch sent, unless the run was logged elsewhere before."""
        recorded = (read_json(self._state_path) or {}).get(self.key, {})
        if recorded.get("at") == self._address:
            self._run_id = recorded["run"]
            self._sent_epoch = recorded["epoch"]

    def _record(self, epoch: int) -> None:
        """Record the run and the last epoch sent."""
        self._sent_epoch = epoch
        with self._state_lock:
            services = read_json(self._state_path) or {}
            services[self.key] = {"at": self._address, "run": self._run_id, "epoch": epoch}
            atomic_write(self._state_path, json.dumps(services, indent=1))


class RemoteLogger:
    """Sends a run's epochs in order from a thread; what failed is sent again later."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._has_warned = False
        # Metrics of an epoch, or at the end whether the run failed; None creates the run.
        self._requests: queue.SimpleQueue[EpochValues | bool | None] = queue.SimpleQueue()
        self._requests.put(None)
        self._thread = threading.Thread(target=self._work, name=f"amlp-{service.name}", daemon=True)
        self._thread.start()

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue the metrics of an epoch."""
        self._requests.put(EpochValues(epoch, values))

    def close(self, failed: bool = False) -> None:
        """End the run, and wait for the server for a while."""
        self._requests.put(failed)
        started = time.monotonic()
        while self._thread.is_alive():
            limit = UNREACHABLE_CLOSE_S if self._has_warned else CLOSE_S
            if time.monotonic() - started >= limit:
                return
            self._thread.join(0.1)

    def _work(self) -> None:
        unsent: deque[EpochValues] = deque()
        is_open = False
        failed: bool | None = None
        while failed is None:
            for request in self._next_requests():
                if isinstance(request, EpochValues):
                    unsent.append(request)
                else:
                    failed = request
            try:
                if not is_open:
                    self._service.open()
                    is_open = True
                while unsent:
                    self._service.send(*unsent[0])
                    unsent.popleft()
                if failed is not None:
                    self._service.end(failed)
            except Exception as error:  # of other libraries: the training continues in any case
                self._warn(error)

    def _next_requests(self) -> list[EpochValues | bool | None]:
        """Wait for a request, and take all: a silent server is tried once for many epochs."""
        requests = [self._requests.get()]
        while not self._requests.empty():
            requests.append(self._requests.get())
        return requests

    def _warn(self, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        reason = shorten(f"{type(error).__name__}: {error}", 140, placeholder=" ...")
        logger.warning(
            "%s cannot be reached (%s); the training continues, and every epoch tries again.",
            self._service.name,
            reason,
        )


class MLflowService(Service):
    """A run in an MLflow experiment.

    It is used by its client alone: the active run of the process is left as it is.
    """

    name = "MLflow"
    key = "mlflow"

    def __init__(self, uri: str, experiment: str, run: RunInfo) -> None:
        super().__init__(uri, run)
        self._experiment = experiment
        self._client: Any = None

    def open(self) -> None:
        from mlflow import MlflowClient

        # It logs every table of a new database.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=self._address)
        self._read_record()
        if self._run_id:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {"group": self._run.group} if self._run.group else {}
            run = self._client.create_run(self._experiment_id(), run_name=self._run.name, tags=tags)
            self._run_id = run.info.run_id
            self._record(-1)
        # Parameters cannot be changed: those of the first start stay.
        if not self._client.get_run(self._run_id).data.params:
            self._send_parameters()

    def _send_parameters(self) -> None:
        from mlflow.entities import Param

        parameters = [Param(key, str(value)) for key, value in self._run.parameters.items()]
        for first in range(0, len(parameters), 100):  # MLflow takes 100 at a time
            self._client.log_batch(self._run_id, params=parameters[first : first + 100])

    def _send(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, epoch) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except MlflowException:  # another trial created it first
                experiment = self._client.get_experiment_by_name(self._experiment)
        return str(experiment.experiment_id)


class WandbService(Service):
    """A run in a W&B project. It gets config and metrics, nothing of the machine or the code."""

    name = "W&B"
    key = "wandb"

    def open(self) -> None:
        import wandb

        self._read_record()
        self._run_id = self._run_id or uuid.uuid4().hex[:12]
        # Recorded before the run exists there: a second try gets the same one.
        self._record(self._sent_epoch)
        entity, _, project = self._address.rpartition("/")
        self._wandb_run: Any = wandb.init(
            entity=entity or None,
            project=project,
            id=self._run_id,
            name=self._run.name,
            group=self._run.group or None,
            config=dict(self._run.parameters),
            dir=self._run.folder,
            resume="allow",
            reinit="create_new",  # runs of other threads are left as they are
            settings=wandb.Settings(
                console="off",
                host="",  # of the machine
                save_code=False,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=CLOSE_S / 2,
                finish_timeout=CLOSE_S,
            ),
        )

    def _send(self, epoch: int, values: Mapping[str, float]) -> None:
        self._wandb_run.log(dict(values), step=epoch, commit=True)

    def end(self, failed: bool) -> None:
        self._wandb_run.finish(exit_code=int(failed))
