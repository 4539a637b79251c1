"""Add up what a study has used and find the limit that it has reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from amlp_ray.config import BudgetConfig
from amlp_ray.study.storage.trial_record import TrialRecord, TrialStats


@dataclass
class Usage:
    """What a study or a trial has used.

    Args:
        trials: begun.
        seconds: of running the study.
        gpu_seconds: for which GPUs were held, over all GPUs.
        epochs: trained.
    """

    trials: int = 0
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    epochs: int = 0

    def as_dict(self) -> dict[str, float]:
        """Return the usage by the names of the budget's limits."""
        return {
            "trials": self.trials,
            "hours": self.seconds / 3600,
            "gpu_hours": self.gpu_seconds / 3600,
            "epochs": self.epochs,
        }

    def reached(self, budget: BudgetConfig, *, but_trials: bool = False) -> str | None:
        """Return the limit that is reached, such as `epochs 500 of 500`; None if there is none.

        Args:
            budget: of the study.
            but_trials: whether the number of trials is left out.
        """
        for name, used in self.as_dict().items():
            limit = getattr(budget, name)
            if limit is None or (but_trials and name == "trials"):
                continue
            if used >= limit:
                return f"{name.replace('_', '-')} {used:.4g} of {limit:g}"
        return None


@dataclass
class BudgetTracker:
    """Usage of a study that runs: its ended trials, and what the running ones have reported."""

    ended: Usage = field(default_factory=Usage)
    running: dict[str, Usage] = field(default_factory=dict)  # by a key of the caller's

    @classmethod
    def from_trials(cls, trials: Iterable[TrialRecord]) -> BudgetTracker:
        """Add up stored trials."""
        tracker = cls()
        for trial in trials:
            tracker.end(None, trial.stats)
        return tracker

    def report(self, key: str, *, epochs: int, gpu_seconds: float) -> None:
        """Note how far a running trial is, over all its processes."""
        self.running[key] = Usage(gpu_seconds=gpu_seconds, epochs=epochs)

    def end(self, key: str | None, stats: TrialStats) -> None:
        """Note what a trial has used in the end."""
        if key is not None:
            self.drop(key)
        self.ended.gpu_seconds += stats.get("gpu_seconds") or 0.0
        self.ended.epochs += stats.get("epochs") or 0

    def drop(self, key: str) -> None:
        """Forget a running trial that resumes later; what it used is added when it ends."""
        self.running.pop(key, None)

    def usage(self, *, trials: int, seconds: float) -> Usage:
        """Return what the study has used.

        Args:
            trials: how many have begun.
            seconds: for how long the study has been run.
        """
        usages = [self.ended, *self.running.values()]
        return Usage(
            trials=trials,
            seconds=seconds,
            gpu_seconds=sum(usage.gpu_seconds for usage in usages),
            epochs=sum(usage.epochs for usage in usages),
        )
