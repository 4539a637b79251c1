"""Write a run's metrics and checkpoints, for pretraining and fine-tuning alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from amlp_ray.config import FaultToleranceConfig
from amlp_ray.training.checkpoint.manager import CheckpointManager, State
from amlp_ray.training.loggers.metrics_file import Metrics, append_row, drop_after
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog, read_events
from amlp_ray.utils.retry import RetryPolicy

METRICS_FILE = "metrics.jsonl"


def speed_metrics(images: int, seconds: float) -> Metrics:
    """Compute the speed of an epoch, of the `images` of all workers."""
    workers = distributed.world_size()
    return {
        "images_per_second": images / seconds,
        "images_per_second_per_worker": images / seconds / workers,
        "workers": workers,
        "seconds": seconds,
    }


class RunRecorder:
    """Records each epoch of a run: a metrics row, then a checkpoint in the background."""

    def __init__(
        self, folder: Path, fault_tolerance: FaultToleranceConfig, events: EventLog
    ) -> None:
        self.folder = folder
        self.events = events
        self.retries = RetryPolicy(folder, minutes=fault_tolerance.storage_minutes, events=events)
        self._checkpoints = CheckpointManager(
            folder, self.retries, keep=fault_tolerance.checkpoints
        )

    def begin(self, epochs: range) -> Metrics:
        """Drop the rows of the epochs that are left to train, and record the start if any are left.

        Returns:
            The last row before them; {} without one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = epochs.start - 1
        rows, dropped = drop_after(self.folder / METRICS_FILE, finished)
        if epochs:
            workers = distributed.world_size()
            self.events.record(
                "started",
                self._describe_change(finished, workers),
                workers=workers,
                epoch=finished,
                repeated=len(dropped),
            )
        return rows[-1] if rows else {}

    def _describe_change(self, finished: int, workers: int) -> str:
        """Tell that the run resumes with another number of workers; empty if it does not."""
        starts = [event for event in read_events(self.folder) if event["event"] == "started"]
        if not starts or starts[-1]["workers"] == workers:
            return ""
        previous = starts[-1]["workers"]
        return f"Resuming after epoch {finished} with {workers} workers instead of {previous}."

    def record_epoch(self, metrics: Metrics, state: State) -> None:
        """Append the epoch's metrics row and begin to save its checkpoint.

        The previous checkpoint is safe before the row is written. So a kill repeats one finished
        epoch at most and rewrites its row, and no row is missing. `state` is copied.

        Raises:
            StorageError: the row, or the previous checkpoint, could not be written.
        """
        epoch = metrics["epoch"]
        self._checkpoints.wait()
        append = partial(append_row, self.folder / METRICS_FILE, metrics)
        self.retries.run(append, f"the metrics row of epoch {epoch}")
        self._checkpoints.save(state | {"epoch": epoch}, epoch)

    def wait(self) -> None:
        """Return once every checkpoint is written. Raises StorageError if one could not be."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Stop what is still being written.

        A run that failed is started again, maybe in this process, and must not meet a second
        writer.
        """
        self._checkpoints.close()
