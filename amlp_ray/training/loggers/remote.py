"""Sending a run's figures to MLflow and Weights & Biases, from a thread, whatever becomes of the server."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, Protocol

from amlp_ray.utils.files import atomic_write, read_json

CLOSE_S = 60.0  # that the end of a run waits for a server; one that answers takes 1 to 3 s on an idle machine
GONE_S = 5.0  # the same, for a server that could not be reached before


class Row(NamedTuple):
    """An epoch's figures by name."""

    epoch: int
    values: Mapping[str, float]


class Run(NamedTuple):
    """What a server is told of a run: its name, that of its study (or nothing), its settings by dotted name."""

    name: str
    group: str
    parameters: Mapping[str, Any]


class LoggerState:
    """`tracking.json`: by service, where its run is (`at`), which it is (`run`), and the last `epoch` sent to it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def of(self, service: str, at: str) -> dict[str, Any]:
        """What is known of the run there; {} where it was followed elsewhere before."""
        found = (read_json(self._path) or {}).get(service, {})
        return found if found.get("at") == at else {}

    def keep(self, service: str, **known: Any) -> None:
        with self._lock:
            everything = read_json(self._path) or {}
            atomic_write(self._path, json.dumps(everything | {service: known}, indent=1))


class Service(Protocol):
    """A server that runs are sent to, or a library that does so. Any method may raise anything."""

    name: str

    def open(self) -> None:
        """Begin a run, or go on with the one that is kept."""
        ...

    def send(self, epoch: int, values: Mapping[str, float]) -> None: ...

    def end(self, failed: bool) -> None: ...


class RemoteLogger:
    """Sends a run's epochs in order by a thread of its own; what could not be sent is tried again after the next."""

    def __init__(self, service: Service, say: Callable[[str], None]) -> None:
        self._service, self._say, self._told = service, say, False
        # an epoch's figures; at the end whether it failed; None: the beginning
        self._asked: queue.SimpleQueue[Row | bool | None] = queue.SimpleQueue()
        self._asked.put(None)
        self._thread = threading.Thread(target=self._work, name=f"amlp-{service.name}", daemon=True)
        self._thread.start()

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._asked.put(Row(epoch, values))

    def close(self, failed: bool = False) -> None:
        self._asked.put(failed)
        started = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - started < (
            GONE_S if self._told else CLOSE_S
        ):
            self._thread.join(0.1)

    def _work(self) -> None:
        waiting: deque[Row] = deque()
        opened, failed = False, None
        while failed is None:
            for asked in self._taken():
                if isinstance(asked, Row):
                    waiting.append(asked)
                else:
                    failed = asked
            try:
                if not opened:
                    self._service.open()
                    opened = True
                while waiting:
                    self._service.send(*waiting[0])
                    waiting.popleft()
                if failed is not None:
                    self._service.end(failed)
            except Exception as error:  # libraries of others: whatever it is, the training goes on
                if not self._told:
                    self._told = True
                    self._say(
                        f"{self._service.name} cannot be told of this run ({_kind(error)}); training on, and trying "
                        f"again after each epoch."
                    )

    def _taken(self) -> list[Row | bool | None]:
        """All that was asked meanwhile, at least one: a server that does not answer is tried once for many epochs."""
        taken = [self._asked.get()]
        while not self._asked.empty():
            taken.append(self._asked.get())
        return taken


class MLflow:
    """A run in an MLflow experiment, by its client alone: the process's own active run is left as it is."""

    name = "MLflow"

    def __init__(self, uri: str, experiment: str, run: Run, kept: LoggerState) -> None:
        self._uri, self._experiment, self._run, self._kept = uri, experiment, run, kept
        self._client: Any = None
        self._id, self._sent = "", -1

    def open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(
            logging.WARNING
        )  # it tells of every table of a new database
        self._client = MlflowClient(tracking_uri=self._uri)
        known = self._kept.of("mlflow", self._uri)
        self._id, self._sent = known.get("run", self._id), known.get("epoch", -1)
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"group": self._run.group} if self._run.group else {}
            run = self._client.create_run(self._experiment_id(), run_name=self._run.name, tags=tags)
            self._id = run.info.run_id
            self._remember(-1)
        if not self._client.get_run(
            self._id
        ).data.params:  # they cannot be changed: those of the first start stay
            parameters = [Param(key, str(value)) for key, value in self._run.parameters.items()]
            for first in range(0, len(parameters), 100):  # as many as it takes at a time
                self._client.log_batch(self._id, params=parameters[first : first + 100])

    def send(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if epoch <= self._sent:  # before a kill; MLflow would keep both
            return
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(key, value, now, epoch) for key, value in values.items()]
        )
        self._remember(epoch)

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _remember(self, epoch: int) -> None:
        self._sent = epoch
        self._kept.keep("mlflow", at=self._uri, run=self._id, epoch=epoch)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except MlflowException:  # another trial was faster
                found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id)


class WandB:
    """A run in a W&B project. It is sent settings and metrics, and nothing of the machine, the code or its output."""

    name = "W&B"

    def __init__(self, project: str, folder: Path, run: Run, kept: LoggerState) -> None:
        self._project, self._folder, self._run, self._kept = project, folder, run, kept
        self._sent = -1
        self._id = ""
        self._open: Any = None

    def open(self) -> None:
        import wandb

        known = self._kept.of("wandb", self._project)
        self._id, self._sent = known.get("run") or uuid.uuid4().hex[:12], known.get("epoch", -1)
        self._remember(self._sent)  # before it exists there: asked again, it is the same
        entity, _, project = self._project.rpartition("/")
        self._open = wandb.init(
            entity=entity or None,
            project=project,
            id=self._id,
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
        if epoch > self._sent:  # W&B takes no step twice
            self._open.log(dict(values), step=epoch, commit=True)
            self._remember(epoch)

    def end(self, failed: bool) -> None:
        self._open.finish(exit_code=int(failed))

    def _remember(self, epoch: int) -> None:
        self._sent = epoch
        self._kept.keep("wandb", at=self._project, run=self._id, epoch=epoch)


def _kind(error: BaseException) -> str:
    """What went wrong, in a line."""
    return shorten(f"{type(error).__name__}: {error}", 140, placeholder=" ...")
