"""Study: make, plan, run, confirm, steer and look at one. Every verb of the command line is a method here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import merged
from amlp_ray.config.yaml_file import read_yaml, write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.path import DataPath
from amlp_ray.errors import StudyError
from amlp_ray.study.operations import change_space, edit, status, transfer, trials
from amlp_ray.study.search_space.validate import build_study
from amlp_ray.study.storage import best_trials
from amlp_ray.study.storage.study_store import Request, StudyStore

if TYPE_CHECKING:
    import pandas as pd

    from amlp_ray.study.execution.driver import StopReason
    from amlp_ray.study.execution.plan import Plan
    from amlp_ray.study.execution.trial_queue import Phase
    from amlp_ray.study.report import Importance

Notify = Callable[[str], None]


class Study:
    """A study and its folder `<runs>/<name>`.

    >>> study = Study.load("studies/quickstart.yaml", data="runs/phantoms")  # doctest: +SKIP
    >>> study.run().confirm()  # doctest: +SKIP
    >>> study.best_trial.params  # doctest: +SKIP
    """

    def __init__(self, config: StudyConfig, store: StudyStore) -> None:
        self.config = config
        self.store = store
        self.outcome: StopReason | None = None  # of the last run

    @classmethod
    def load(
        cls,
        file: str | Path,
        *,
        data: str | Path | None = None,
        eval_data: str | Path | None = None,
        runs: str | Path = "runs",
        overrides: dict[str, Any] | None = None,
    ) -> Study:
        """Load a study from its YAML file; nothing is written before `run`.

        Args:
            data: patch dataset by path or URI, in place of the file's `data`. Its training images are pretrained on.
            labels: another one, in place of the file's `labels`, whose images then score encoders and are shown. It
                must be of the same shape and scale. Whether its val or test images are among those pretrained on, in
                another copy perhaps, is for `amlp-ray data check LABELS --against DATA` to say.
            runs: folder of all studies.
            overrides: settings by nested names, such as `{"budget": {"trials": 4}}`.

        Raises:
            ConfigError: with every fault of the file, by line. StudyError: no data set is named.
        """
        values = read_yaml(file)
        build_study(values, str(file))  # so that a fault of the file is told as the file's
        given = {
            name: str(place)
            for name, place in (("data", data), ("eval_data", eval_data))
            if place is not None
        }
        return cls._of(
            merged(values, overrides or {}) | given, "overrides (--set)", runs, of=str(file)
        )

    @classmethod
    def create(cls, *, runs: str | Path = "runs", **config: Any) -> Study:
        """Make a study from Python, in the words of the YAML file; nothing is written before `run`.

        `space` maps names to `Range`, `Choice`, `Fixed`, `Derived` or plain mappings, or is a function of an Optuna
        trial, defined in a module that the workers can import.

        >>> Study.create(name="low", data="runs/mine", space={"ratio.start": {"low": 0.1, "high": 0.5}}).settings.seed
        0

        Raises: as `load`.
        """
        return cls._of(config, "Study.create", runs, of="Study.create")

    @classmethod
    def _of(cls, values: Mapping[str, Any], source: str, runs: str | Path, *, of: str) -> Study:
        config = build_study(values, source)
        if config.data is None:
            raise StudyError(f"{of} names no data set; give one with --data or the key data.")
        named = {
            name: path
            for name in ("data", "eval_data")
            if (path := getattr(config, name)) is not None
        }
        config = config.model_copy(
            update={name: str(DataPath(path)) for name, path in named.items()}
        )
        return cls(config, StudyStore(Path(runs) / config.name))

    @classmethod
    def open(cls, name: str, *, runs: str | Path = "runs") -> Study:
        """Open a study that was run before, to look at it or go on. Raises StudyError where there is none."""
        store = StudyStore.open(Path(runs) / name)
        return cls(store.config(), store)

    @cached_property
    def dataset(self) -> PatchDataset:
        assert self.config.data is not None
        return PatchDataset.open(self.config.data)

    @cached_property
    def eval_data(self) -> PatchDataset | None:
        """The data set of labelled images, where it is one apart."""
        return None if self.config.eval_data is None else PatchDataset.open(self.config.eval_data)

    # Before

    def validate(self) -> None:
        """Raise ConfigError or DataError for what would fail only after hours."""
        from amlp_ray.study.execution.plan import check_study

        check_study(self.config, self.dataset, self.eval_data)

    def plan(self, address: str | None = None) -> Plan:
        """Check and price the study, for this machine or for the cluster at `address`; nothing is run."""
        from amlp_ray.runtime.resources import cluster_resources, machine_resources
        from amlp_ray.runtime.session import ray_session
        from amlp_ray.study.execution.plan import make_plan

        if address is None:
            return make_plan(
                self.config, self.dataset, machine_resources(), self.eval_data, self.store
            )
        with ray_session(address):
            return make_plan(
                self.config, self.dataset, cluster_resources(), self.eval_data, self.store
            )

    def dry_run(self, address: str | None = None) -> dict[str, Any]:
        """Run two steps and a probe of one trial in a worker of the cluster, and keep nothing."""
        from amlp_ray.runtime.session import ray_session
        from amlp_ray.study.execution.dry_run import dry_run

        self.validate()
        with ray_session(address):
            return dry_run(self.config, self.dataset, self.eval_data)

    # Running

    def run(self, address: str | None = None, *, notify: Notify = print) -> Study:
        """Run the study, or go on with it where it stopped; ends when its budget is used or somebody ends it.

        Trials of a process that died are taken over: same number, from their checkpoint.

        Args:
            address: of a Ray cluster; without one, Ray is started on this machine.
            notify: gets one line per change of a trial's state.

        Raises:
            StudyError: another process runs this study, or it was begun with other settings.
            ResourceError: no node can hold a trial, or none came free. FailedStudyError: the first trials failed alike.
            InterruptedStudyError: after Ctrl-C.
        """
        return self._run("search", address, notify)

    resume = run

    def confirm(self, address: str | None = None, *, notify: Notify = print) -> Study:
        """Train the best trials and every baseline again over several seeds, by both protocols, and open the test images.

        They are opened once, when all runs are finished; a second call shows what was found then.

        Raises: as `run`, and StudyError where no trial is complete.
        """
        from amlp_ray.study.confirmation.confirm import (
            confirmation_notes,
            find_test_unlock,
            open_test,
        )

        if find_test_unlock(self.store):  # more runs could never be scored on the test images
            self.outcome = "done"
        else:
            for note in confirmation_notes(
                self.store, self.config
            ):  # raises where there is nothing to confirm
                notify(f"note: {note}")
            self._run("confirm", address, notify)
        if self.outcome == "done":
            open_test(self.store, self.config, self.eval_data or self.dataset, notify=notify)
        return self

    def _run(self, phase: Phase, address: str | None, notify: Notify) -> Study:
        from amlp_ray.data.loading.image_cache import swept
        from amlp_ray.runtime.resources import (
            cluster_resources,
            jobs_side_by_side,
            machine_resources,
        )
        from amlp_ray.runtime.session import ray_session
        from amlp_ray.study.execution.driver import run_on_tune
        from amlp_ray.study.execution.monitor import EventLog
        from amlp_ray.study.execution.preflight import (
            check_unchanged,
            note_environment,
            note_pruning,
            with_budget,
        )

        check_unchanged(self.config, self.store, self.dataset, self.eval_data)
        if (self.store.folder / "run.lock").is_file() and (holder := self.store.holder()):
            raise StudyError(
                f"Study {self.config.name!r} is already run by {holder}; wait for it, or end it."
            )
        self.validate()
        if address is None:
            jobs_side_by_side(
                self.config.resources, machine_resources()
            )  # refuse before a cluster is started
        self.store.folder.mkdir(parents=True, exist_ok=True)
        if not (self.store.folder / "study.yaml").is_file():
            write_yaml(self.config, self.store.folder / "study.yaml")
        log = EventLog(self.store.folder, notify)
        self.store.storage(patience=self.config.fault_tolerance.storage_minutes * 60, notify=log)
        with self.store.lock(counted=phase == "search") as lease, swept():
            check_unchanged(self.config, self.store, self.dataset, self.eval_data)
            self.config = with_budget(self.config, self.store, log)
            write_yaml(self.config, self.store.folder / "study.yaml")
            self.store.search().set_user_attr("request", None)
            with ray_session(address) as session:
                cluster = cluster_resources()
                side_by_side = jobs_side_by_side(self.config.resources, cluster)
                note_environment(self.config, self.store, cluster, self.dataset, self.eval_data)
                log(
                    f"study {self.config.name}: {side_by_side} trials side by side, folder {self.store.folder}"
                )
                if phase == "search":
                    note_pruning(self.config, self.dataset.count("train"), log)
                if session.dashboard:
                    log(f"Ray dashboard: {session.dashboard}")
                self.outcome = run_on_tune(
                    self.store,
                    self.config,
                    lease,
                    log,
                    data=self.dataset.path,
                    eval_data=None if self.eval_data is None else self.eval_data.path,
                    images=self.dataset.count("train"),
                    side_by_side=side_by_side,
                    phase=phase,
                )
                log(_OUTCOMES[self.outcome].format(name=self.config.name))
        return self

    # Steering, from any process that sees the study

    def request(self, verb: Request) -> None:
        """Leave word for the process that runs the study; it looks every second."""
        self.store.request(verb)

    def pause(self) -> None:
        """Running trials return after their epoch, and are continued by `resume`."""
        self.request("pause")

    def stop(self) -> None:
        """No new trials; running ones finish."""
        self.request("stop")

    def cancel(self) -> None:
        """Running trials end now, and have failed."""
        self.request("cancel")

    def extend(self, **amounts: Any) -> Study:
        """Change the budget, such as `trials="+10"` or `hours=8`; see `edit.extend`."""
        self.config = self.config.model_copy(update={"budget": edit.extend(self.store, **amounts)})
        return self

    def change_space(
        self, file: str | Path, change: change_space.Change | None = None
    ) -> change_space.Migration:
        """Go on with the space of another study file; see `migrate.migrate`."""
        new = build_study(read_yaml(file), str(file))
        migration = change_space.migrate(self.store, new, change or change_space.Change())
        self.config = self.store.config()
        return migration

    def enqueue(self, values: Mapping[str, Any]) -> int:
        """Ask for a trial with these values; what they leave open is sampled. Returns its number."""
        return edit.enqueue(self.store, self.config, values)

    def retry(self, number: int) -> int:
        """Ask for a trial's settings again, with another seed. Returns the number of the new trial."""
        return edit.retry(self.store, self.config, number)

    def replay(self, number: int, **where: Any) -> dict[str, Any]:
        """Train a trial again in another folder and compare every rung's score; see `replay.replay`."""
        from amlp_ray.study.operations.replay import replay

        return replay(self.store, self.config, number, **where)

    def import_(self, source: str | Path) -> transfer.Imported:
        """Take trials of a CSV file or another study as prior knowledge; see `exchange.import_trials`."""
        return transfer.import_trials(self.store, self.config, source)

    def delete(self) -> None:
        """Delete the folder and what a database holds of the study. Raises StudyError while it is run."""
        edit.delete(self.store)

    # Looking

    @property
    def best_trial(self) -> FrozenTrial:
        """The best COMPLETE trial of the search by the study's metric. Raises StudyError where there is none."""
        return best_trials.best_trial(self.store, self.config)

    @property
    def best_trials(self) -> list[FrozenTrial]:
        """The Pareto front of several objectives; of one, the best trial."""
        return best_trials.front(self.store.search().get_trials(deepcopy=False), self.config)

    def trials(self) -> list[dict[str, Any]]:
        """All trials as plain rows, baselines and confirmation after the search."""
        return trials.trial_rows(self.store, self.config)

    def trials_dataframe(self) -> pd.DataFrame:
        """All trials: kind, number, state, scores, what they took, and one column per searched setting."""
        import pandas as pd

        return pd.DataFrame(self.trials())

    def trial(self, number: int) -> dict[str, Any]:
        """All there is of one trial: settings, rungs, what it took, provenance, files."""
        return trials.trial_facts(self.store, number)

    def status(self) -> dict[str, Any]:
        """Who runs the study, trials by state, budget used and allowed, best, baselines, confirmation."""
        return status.status(self.store)

    def importance(self) -> dict[str, Importance]:
        """By objective, how much of the difference between good trials and all each searched setting explains."""
        from amlp_ray.study.report import importances

        return importances(self.store)

    def verdict(self) -> list[str]:
        """What the confirmation shows, a sentence each; empty before there is one."""
        from amlp_ray.study.report import confirmation_in_words

        return confirmation_in_words(self.store)

    def compare(self, *others: Study) -> dict[str, Any]:
        """This study beside others: bests, baselines, settings that differ, trials in common."""
        from amlp_ray.study.operations.compare import compare

        return compare([self.store, *(other.store for other in others)])

    def export(self, out: str | Path) -> int:
        """Write all trials to a .csv, .parquet or .json file; returns how many."""
        return transfer.export_trials(self.store, Path(out))

    def report(self) -> Path:
        """Write `report.html` and return its path."""
        from amlp_ray.study.report import write_report

        return write_report(self.store)


_OUTCOMES = {
    "done": "study {name} is done",
    "budget": "study {name} has used its budget; `amlp-ray study extend {name}` gives it more",
    "paused": "study {name} is paused; `amlp-ray study resume {name}` goes on",
    "stopped": "study {name} is stopped; `amlp-ray study resume {name}` goes on",
    "cancelled": "study {name} is cancelled; `amlp-ray study resume {name}` goes on without the trials that ran",
}
