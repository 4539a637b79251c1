"""A trial that is to be run, and one that Tune has: whether it runs or waits for resources."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import optuna

from amlp_ray.config import COST_OBJECTIVES, StudyConfig
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.study.execution.trial import SCORES, usage_so_far
from amlp_ray.study.storage.trial_record import TrialStats, finite
from amlp_ray.study.trial_spec import TrialSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueuedTrial:
    """A stored trial that is to be run."""

    study: optuna.Study  # one of the three
    number: int  # Optuna's, within that study
    trial_spec: TrialSpec  # what the trial's process is told
    params: Mapping[str, Any]  # searched parameters, to show
    is_resumed: bool  # whether it ran before, in a process that died or stopped


@dataclass
class ActiveTrial:
    """A trial that Tune runs, or will run as soon as there are resources.

    Times are in seconds of the monotonic clock.
    """

    tune_id: str  # Tune's name of it
    queued: QueuedTrial
    handed_out: float = field(default_factory=time.monotonic)
    started: float | None = None  # when it got its resources; None while it waits for them

    @property
    def key(self) -> tuple[optuna.Study, int]:
        """The Optuna study and the number by which the trial is stored."""
        return self.queued.study, self.queued.number

    @property
    def run(self) -> RunSpec:
        return self.queued.trial_spec.run

    @property
    def is_search(self) -> bool:
        return self.queued.trial_spec.kind == "search"

    @property
    def elapsed(self) -> float:
        """Seconds that it has held its resources."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def waited(self) -> float:
        """Seconds that it has waited for its resources until now; 0 once it has them."""
        return time.monotonic() - self.handed_out if self.started is None else 0.0

    def usage(self) -> dict[str, Any]:
        """Return what it has taken by its own files, for a trial that cannot report it."""
        return usage_so_far(self.run.folder, self.elapsed)

    def stats(self, result: Mapping[str, Any]) -> TrialStats:
        """Return what it took and scored, from its last result."""
        seconds = float(result.get("seconds", self.elapsed))
        stats: dict[str, Any] = {
            "seconds": round(seconds, 2),
            "gpu_seconds": round(seconds * self.run.gpus, 2),
        }
        measured = ("memory", "epochs", "images_per_second")
        stats |= {name: result[name] for name in measured if name in result}
        stats["scores"] = {name: result[name] for name in SCORES if name in result}
        return cast("TrialStats", stats)

    def objective_values(
        self, config: StudyConfig, stats: TrialStats, score: float
    ) -> list[float] | None:
        """Return one value per objective; None if one is missing or not finite.

        Baselines and confirmation runs have the study's metric alone, whose value is `score`.
        """
        if not self.is_search:
            return [score]
        values = []
        for name in config.objectives:
            source: Mapping[str, Any] = stats if name in COST_OBJECTIVES else stats["scores"]
            value = finite(source.get(name))
            if value is None:
                return None
            values.append(value)
        return values

    def log_start(self) -> None:
        """Log that a worker is asked for, and with which parameters."""
        verb = "continues" if self.queued.is_resumed else "starts"
        values = self.queued.params.items()
        params = ", ".join(f"{name}={_short(value)}" for name, value in values)
        message = f"{self.run.label} {verb}"
        logger.info("%s", f"{message}: {params}" if params else message)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
