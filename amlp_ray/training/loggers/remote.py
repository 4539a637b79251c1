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
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, Protocol

from amlp_ray.utils.files import atomic_write, read_json

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
    """What a server is told of a run.

    Args:
        name: of the run.
        group: name of its study, or empty.
        parameters: its config by dotted name.
    """

    name: str
    group: str
    parameters: Mapping[str, Any]


class LoggerState:
    """`tracking.json`: for each service its address, its run and the last epoch sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self, service: str, address: str) -> dict[str, Any]:
        """Read what is known of the run at a service; {} if it was logged elsewhere before."""
        state = (read_json(self._path) or {}).get(service, {})
        return state if state.get("at") == address else {}

    def write(self, service: str, *, address: str, run_id: str, epoch: int) -> None:
        """Record a run and the last epoch sent."""
        with self._lock:
            services = read_json(self._path) or {}
            services[service] = {"at": address, "run": run_id, "epoch": epoch}
            atomic_write(self._path, json.dumps(services, indent=1))


class Service(Protocol):
    """A server that runs are sent to. Any method may raise anything."""

    name: str

    def open(self) -> None:
        """Create a run, or resume the recorded one."""
        ...

    def send(self, epoch: int, values: Mapping[str, float]) -> None:
        """Send the metrics of an epoch."""
        ...

    def end(self, failed: bool) -> None:
        """End the run."""
        ...


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


class MLflowService:
    """A run in an MLflow experiment.

    It is used by its client alone: the active run of the process is left as it is.
    """

    name = "MLflow"

    def __init__(self, uri: str, experiment: str, run: RunInfo, state: LoggerState) -> None:
        self._uri = uri
        self._experiment = experiment
        self._run = run
        self._state = state
        self._client: Any = None
        self._run_id = ""
        self._sent_epoch = -1

    def open(self) -> None:
        from mlflow import MlflowClient

        # It logs every table of a new database.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=self._uri)
        recorded = self._state.read("mlflow", self._uri)
        self._run_id = recorded.get("run", self._run_id)
        self._sent_epoch = recorded.get("epoch", -1)
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

    def send(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if epoch <= self._sent_epoch:  # sent before a kill; MLflow would show both
            return
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, epoch) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)
        self._record(epoch)

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _record(self, epoch: int) -> None:
        self._sent_epoch = epoch
        self._state.write("mlflow", address=self._uri, run_id=self._run_id, epoch=epoch)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except MlflowException:  # another trial created it first
                experiment = self._client.get_experiment_by_name(self._experiment)
        return str(experiment.experiment_id)


class WandbService:
    """A run in a W&B project. It gets config and metrics, nothing of the machine or the code."""

    name = "W&B"

    def __init__(self, project: str, folder: Path, run: RunInfo, state: LoggerState) -> None:
        self._project = project
        self._folder = folder
        self._run = run
        self._state = state
        self._wandb_run: Any = None
        self._run_id = ""
        self._sent_epoch = -1

    def open(self) -> None:
        import wandb

        recorded = self._state.read("wandb", self._project)
        self._run_id = recorded.get("run") or uuid.uuid4().hex[:12]
        # Recorded before the run exists there: a second try gets the same one.
        self._record(recorded.get("epoch", -1))
        entity, _, project = self._project.rpartition("/")
        self._wandb_run = wandb.init(
            entity=entity or None,
            project=project,
            id=self._run_id,
            name=self._run.name,
            group=self._run.group or None,
            config=dict(self._run.parameters),
            dir=self._folder,
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

    def send(self, epoch: int, values: Mapping[str, float]) -> None:
        if epoch > self._sent_epoch:  # W&B takes no step twice
            self._wandb_run.log(dict(values), step=epoch, commit=True)
            self._record(epoch)

    def end(self, failed: bool) -> None:
        self._wandb_run.finish(exit_code=int(failed))

    def _record(self, epoch: int) -> None:
        self._sent_epoch = epoch
        self._state.write("wandb", address=self._project, run_id=self._run_id, epoch=epoch)
