"""Study: create, plan, run, confirm, control and read one. Every study command is a method here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import merge
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.path import DataPath
from amlp_ray.errors import StudyError
from amlp_ray.study.operations import change_space, edit, repair, status, transfer, trials
from amlp_ray.study.operations.templates import read_study_file
from amlp_ray.study.search_space import space_function
from amlp_ray.study.search_space.validate import build_study
from amlp_ray.study.storage import best_trials
from amlp_ray.study.storage.requests import Verb
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import trial_records

if TYPE_CHECKING:
    import pandas as pd

    from amlp_ray.study.execution.plan import Plan
    from amlp_ray.study.execution.run_study import StudyInputs
    from amlp_ray.study.execution.stop_reason import StopReason
    from amlp_ray.study.report import Importance


class Study:
    """A study and its folder `<runs>/<name>`.

    Attributes:
        config: settings of the study.
        store: its folder and Optuna storage.
        stop_reason: why the last run in this process ended; None before one.

    >>> study = Study.load("studies/quickstart.yaml", data="runs/phantoms")
    >>> study.run().confirm()
    >>> study.best_trial.params
    """

    def __init__(self, config: StudyConfig, store: StudyStore) -> None:
        self.config = config
        self.store = store
        self.stop_reason: StopReason | None = None

    @classmethod
    def load(
        cls,
        file: str | Path,
        *,
        data: str | Path | None = None,
        eval_data: str | Path | None = None,
        runs: str | Path = "runs",
        overrides: dict[str, Any] | None = None,
        allow_code: bool = False,
    ) -> Study:
        """Load a study from its YAML file; nothing is written before `run`.

        Args:
            file: the study file.
            data: path or URI of the patch dataset to pretrain on; replaces the file's `data`.
            eval_data: another patch dataset of the same shape and scale, whose images score
                encoders and are shown; replaces the file's `eval_data`. Check with
                `amlp-ray data check EVAL_DATA --against DATA` that its val and test images are not
                among those pretrained on.
            runs: folder of all studies.
            overrides: settings by nested names, such as `{"budget": {"trials": 4}}`.
            allow_code: whether to import a space that names a Python function; runs its module.

        Raises:
            ConfigError: the file has mistakes; the message lists all, by line.
            StudyError: no dataset is named.
        """
        values = read_study_file(file)
        # So that mistakes are reported with the file's name.
        build_study(values, str(file), should_allow_code=allow_code)
        datasets = {"data": data, "eval_data": eval_data}
        paths = {name: str(path) for name, path in datasets.items() if path is not None}
        merged = merge(values, overrides or {}) | paths
        return cls._from_values(
            merged, "overrides (--set)", runs, named_in=str(file), allow_code=allow_code
        )

    @classmethod
    def create(cls, *, runs: str | Path = "runs", allow_code: bool = False, **config: Any) -> Study:
        """Create a study by the keys of the YAML file; nothing is written before `run`.

        Args:
            runs: folder of all studies.
            allow_code: whether a space that is the text `module:function` is imported.
            **config: settings of the study. `space` maps names to `Range`, `Choice`, `Fixed`,
                `Derived` or plain mappings, or is a function of an Optuna trial, defined in a
                module that the workers can import.

        Raises:
            ConfigError, StudyError: as `load`.

        >>> space = {"ratio.start": {"low": 0.1, "high": 0.5}}
        >>> Study.create(name="low", data="runs/mine", space=space).config.seed
        0
        """
        return cls._from_values(
            config, "Study.create", runs, named_in="Study.create", allow_code=allow_code
        )

    @classmethod
    def _from_values(
        cls,
        values: Mapping[str, Any],
        source: str,
        runs: str | Path,
        *,
        named_in: str,
        allow_code: bool,
    ) -> Study:
        config = build_study(values, source, should_allow_code=allow_code)
        if config.data is None:
            raise StudyError(f"{named_in} names no dataset; give one with --data or the key data.")
        given = {"data": config.data, "eval_data": config.eval_data}
        paths = {name: str(DataPath(path)) for name, path in given.items() if path is not None}
        config = config.model_copy(update=paths)
        return cls(config, StudyStore(Path(runs) / config.name))

    @classmethod
    def open(cls, name: str, *, runs: str | Path = "runs", allow_code: bool = False) -> Study:
        """Open a study that was run before, to read or resume it.

        Args:
            name: of the study.
            runs: folder of all studies.
            allow_code: as `load`; to resume a study asks for it again.

        Raises StudyError if there is none.

        >>> Study.open("low").status()["states"]
        {'COMPLETE': 14, 'PRUNED': 2}
        """
        store = StudyStore.open(Path(runs) / name)
        config = store.config()
        if allow_code:
            space_function.allow_code(config.space)
        return cls(config, store)

    @cached_property
    def dataset(self) -> PatchDataset:
        """The dataset that trials pretrain on."""
        assert self.config.data is not None
        return PatchDataset.open(self.config.data)

    @cached_property
    def eval_data(self) -> PatchDataset | None:
        """The dataset that scores trials; None if `dataset` does."""
        return None if self.config.eval_data is None else PatchDataset.open(self.config.eval_data)

    # Before

    def validate(self) -> None:
        """Raise ConfigError or DataError for what would fail only after hours."""
        from amlp_ray.study.execution.plan import check_study

        check_study(self.config, self.dataset, self.eval_data)

    def plan(self, address: str | None = None) -> Plan:
        """Check the study and estimate its cost; nothing is run.

        Args:
            address: of the Ray cluster to plan for; by default this machine.

        >>> study.plan().hours
        (2.1, 2.9, 4.0)
        """
        from amlp_ray.runtime.resources import cluster_resources, machine_resources
        from amlp_ray.runtime.session import ray_session
        from amlp_ray.study.execution.plan import make_plan

        if address is None:
            cluster = machine_resources()
        else:
            with ray_session(address):
                cluster = cluster_resources()
        return make_plan(self.config, self.dataset, cluster, self.eval_data, self.store)

    def dry_run(self, address: str | None = None) -> dict[str, Any]:
        """Run two steps and a probe of one trial in a worker of the cluster; nothing is written."""
        from amlp_ray.runtime.session import ray_session
        from amlp_ray.study.execution.dry_run import dry_run

        self.validate()
        with ray_session(address):
            return dry_run(self.config, self.dataset, self.eval_data)

    # Running

    def run(self, address: str | None = None) -> Study:
        """Run the study, or resume it; return when its budget is used or somebody stops it.

        Trials of a process that died are resumed: same number, from their checkpoint. Each change
        of a trial's state is logged to logger `amlp_ray` and to `events.log`.

        Args:
            address: of a Ray cluster; without one, Ray is started on this machine.

        Raises:
            StudyError: another process runs this study, or it was begun with other settings.
            ResourceError: no node can hold a trial, or no resources came free.
            FailedStudyError: the first trials failed for the same reason.
            InterruptedStudyError: after Ctrl-C or SIGTERM.
            StorageError, ClusterLostError: the trials' disk or the cluster is lost for too long.

        >>> study.run().stop_reason
        <StopReason.DONE: 'done'>
        """
        from amlp_ray.study.execution.run_study import run_study

        self.config, self.stop_reason = run_study(self._inputs(address))
        return self

    resume = run

    def confirm(self, address: str | None = None) -> Study:
        """Repeat the best trials and all baselines over several seeds, and open the test images.

        Both protocols score every run. Test images are opened once, when all runs are finished. A
        second call shows what was found then.

        Args:
            address: as `run`.

        Raises:
            StudyError: no trial is complete, or as `run`.
            ResourceError, FailedStudyError, InterruptedStudyError: as `run`.

        >>> study.confirm().verdict()[1]
        'Against baseline mae (plain MAE), 0.608: +0.004 [-0.012, +0.019], p 0.55 after Holm ...'
        """
        from amlp_ray.study.execution.run_study import confirm_study

        self.config, self.stop_reason = confirm_study(self._inputs(address))
        return self

    def _inputs(self, address: str | None) -> StudyInputs:
        from amlp_ray.study.execution.run_study import StudyInputs

        return StudyInputs(self.config, self.store, self.dataset, self.eval_data, address)

    # Control, from any process that sees the study

    def request(self, verb: Verb) -> bool:
        """Ask the process that runs the study to pause, stop or cancel; it polls every second.

        Returns:
            Whether somebody runs it; otherwise there is nobody to ask.
        """
        return self.store.request(verb) is not None

    def pause(self) -> bool:
        """Make running trials return after their epoch; `resume` resumes them. See `request`."""
        return self.request("pause")

    def stop(self) -> bool:
        """Start no new trials; running ones finish. See `request`."""
        return self.request("stop")

    def cancel(self) -> bool:
        """End running trials now; they count as failed. See `request`."""
        return self.request("cancel")

    def extend(self, **amounts: Any) -> Study:
        """Change the budget, such as `trials="+10"` or `hours=8`; see `edit.extend`.

        >>> study.extend(trials="+10").run()
        """
        self.config = self.config.model_copy(update={"budget": edit.extend(self.store, **amounts)})
        return self

    def change_space(
        self,
        file: str | Path,
        change: change_space.Change | None = None,
        *,
        allow_code: bool = False,
    ) -> change_space.Migration:
        """Replace the search space by that of another study file; see `change_space.migrate`."""
        new = build_study(read_study_file(file), str(file), should_allow_code=allow_code)
        migration = change_space.migrate(self.store, new, change or change_space.Change())
        self.config = self.store.config()
        return migration

    def enqueue(self, values: Mapping[str, Any]) -> int:
        """Enqueue a trial with these values, sampling the others; return its number.

        >>> study.enqueue({"ratio.start": 0.4})
        16
        """
        return edit.enqueue(self.store, self.config, values)

    def retry(self, number: int) -> int:
        """Enqueue a trial's parameters with another seed; return the new trial's number."""
        return edit.retry(self.store, self.config, number)

    def replay(self, number: int, **where: Any) -> dict[str, Any]:
        """Train a trial again and compare every rung's score; see `replay.replay`."""
        from amlp_ray.study.operations.replay import replay

        return replay(self.store, self.config, number, **where)

    def import_(self, source: str | Path, **options: Any) -> transfer.Imported:
        """Import trials of a CSV file or another study; see `transfer.import_trials`."""
        return transfer.import_trials(self.store, self.config, source, **options)

    def repair(self) -> repair.Repair:
        """Restore what the storage has lost from the folders of the runs; see `repair.repair`.

        >>> study.repair().restored
        ['trial 0', 'trial 1', 'baseline mae-0']
        """
        return repair.repair(self.store)

    def delete(self) -> None:
        """Delete the folder, and the study in its database.

        Raises:
            StudyError: somebody runs it.
        """
        edit.delete(self.store)

    # Reading

    @property
    def best_trial(self) -> FrozenTrial:
        """The best COMPLETE trial of the search by the study's metric.

        Raises:
            StudyError: no trial is complete.

        >>> study.best_trial.params
        {'ratio.start': 0.31, 'rise': 0.22}
        """
        return best_trials.best_trial(self.store, self.config).frozen

    @property
    def best_trials(self) -> list[FrozenTrial]:
        """The Pareto front of several objectives; of one, the best trial."""
        best = best_trials.pareto_front(trial_records(self.store.search()), self.config)
        return [trial.frozen for trial in best]

    def trials(self) -> list[dict[str, Any]]:
        """Return all trials as rows: the search, then baselines, then the confirmation."""
        return trials.trial_rows(self.store, self.config)

    def trials_dataframe(self) -> pd.DataFrame:
        """Return all trials: kind, number, state, scores, costs and one column per parameter.

        >>> study.trials_dataframe().groupby("kind")["dsc"].max()
        """
        import pandas as pd

        return pd.DataFrame(self.trials())

    def trial(self, number: int) -> dict[str, Any]:
        """Return everything about one trial: settings, rungs, costs, provenance, files."""
        return trials.trial_details(self.store, number)

    def status(self) -> dict[str, Any]:
        """Return who runs the study, trials by state, budget, best trials and confirmation."""
        return status.status(self.store)

    def importance(self) -> dict[str, Importance]:
        """Return how important each parameter is, by objective."""
        from amlp_ray.study.report import importances

        return importances(self.store)

    def verdict(self) -> list[str]:
        """Return what the confirmation shows in sentences; empty before there is one."""
        from amlp_ray.study.report import confirmation_in_words

        return confirmation_in_words(self.store)

    def compare(self, *others: Study) -> dict[str, Any]:
        """Compare this study with others: best trials, baselines, settings, common trials."""
        from amlp_ray.study.operations.compare import compare

        return compare([self.store, *(other.store for other in others)])

    def export(self, out: str | Path) -> int:
        """Write all trials to a .csv, .parquet or .json file; return how many."""
        return transfer.export_trials(self.store, Path(out))

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report and return its path, by default `report.html` in the study's folder."""
        from amlp_ray.study.report import write_report

        return write_report(self.store, out)
