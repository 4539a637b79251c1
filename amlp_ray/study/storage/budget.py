"""What a study has spent and which limit it has reached; all of it follows from the stored trials and the lease."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import BudgetConfig


def counts_in_budget(trial: FrozenTrial) -> bool:
    """Whether a trial of the search uses up `budget.trials`: one imported, or answered from the store, does not."""
    known = "source" in trial.user_attrs or "copy_of" in trial.user_attrs
    return trial.state != TrialState.WAITING and not known


@dataclass
class Usage:
    """Trials begun, seconds run, GPU-seconds held, epochs trained."""

    trials: int = 0
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    epochs: int = 0

    def as_dict(self) -> dict[str, float]:
        return {
            "trials": self.trials,
            "hours": self.seconds / 3600,
            "gpu_hours": self.gpu_seconds / 3600,
            "epochs": self.epochs,
        }

    def reached(self, budget: BudgetConfig, *, but_trials: bool = False) -> str | None:
        """Which limit is reached, as `epochs 500 of 500`; None while there is budget left."""
        limits = budget.model_dump()
        for name, used in self.as_dict().items():
            limit = limits[name]
            if limit is not None and used >= limit and not (but_trials and name == "trials"):
                return f"{name.replace('_', '-')} {used:.4g} of {limit:g}"
        return None


@dataclass
class BudgetTracker:
    """`Spent` of a study that runs: trials that ended, once, and what the running ones have reported so far."""

    ended: Usage = field(default_factory=Usage)
    running: dict[str, Usage] = field(default_factory=dict)  # by Tune's trial id

    @classmethod
    def of(cls, trials: Iterable[FrozenTrial]) -> BudgetTracker:
        """Of trials as stored."""
        budget_tracker = cls()
        for trial in trials:
            budget_tracker.end(None, trial.user_attrs.get("stats") or {})
        return budget_tracker

    def report(self, key: str, *, epochs: int, gpu_seconds: float) -> None:
        """Note how far a running trial is, over all its lives."""
        self.running[key] = Usage(gpu_seconds=gpu_seconds, epochs=epochs)

    def end(self, key: str | None, facts: Mapping[str, Any]) -> None:
        """Note what a trial has spent in the end."""
        if key is not None:
            self.running.pop(key, None)
        self.ended.gpu_seconds += facts.get("gpu_seconds") or 0.0
        self.ended.epochs += facts.get("epochs") or 0

    def drop(self, key: str) -> None:
        """Forget a running trial that will go on later; what it has spent is told when it ends."""
        self.running.pop(key, None)

    def spent(self, *, trials: int, seconds: float) -> Usage:
        return Usage(
            trials=trials,
            seconds=seconds,
            gpu_seconds=self.ended.gpu_seconds
            + sum(part.gpu_seconds for part in self.running.values()),
            epochs=self.ended.epochs + sum(part.epochs for part in self.running.values()),
        )
