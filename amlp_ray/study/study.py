"""Study: load, plan, run, look at."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudySettings
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.place import Place
from amlp_ray.errors import InterruptedStudyError, StudyError
from amlp_ray.files import write_whole
from amlp_ray.settings import build, flat, merged, read_yaml, write_yaml
from amlp_ray.study.design import prunable_rungs
from amlp_ray.study.store import StudyStore

if TYPE_CHECKING:
    import pandas as pd

    from amlp_ray.study.plan import Plan

# What may change between runs of one study; data may be moved, and its fingerprint is compared instead of its path.
CHANGEABLE = ("budget.", "resources.", "faults.", "confirm.", "arms", "arm_seeds", "description", "data", "labels", "tie",
              "sampler.ahead", "pretrain.data")  # fmt: skip


class Study:
    """A study and its folder `<runs>/<name>`.

    >>> study = Study.load("studies/quickstart.yaml", data="runs/phantoms")  # doctest: +SKIP
    >>> study.run()  # doctest: +SKIP
    >>> study.best_trial.params  # doctest: +SKIP
    """

    def __init__(self, settings: StudySettings, store: StudyStore) -> None:
        self.settings = settings
        self.store = store

    @classmethod
    def load(
        cls,
        file: str | Path,
        *,
        data: str | Path | None = None,
        labels: str | Path | None = None,
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
            SettingsError: a bad file or value. StudyError: no data set is named.
        """
        values = read_yaml(file)
        build(StudySettings, values, str(file))  # so that a fault of the file is told as the file's
        values = merged(values, overrides or {})
        values |= {name: str(given) for name, given in (("data", data), ("labels", labels)) if given is not None}
        settings = build(StudySettings, values, "overrides (--set)")
        if settings.data is None:
            raise StudyError(f"{file} names no data set; give one with --data or the key data.")
        named = {name: path for name in ("data", "labels") if (path := getattr(settings, name)) is not None}
        settings = settings.model_copy(update={name: str(Place(path)) for name, path in named.items()})
        return cls(settings, StudyStore(Path(runs) / settings.name))

    @classmethod
    def open(cls, name: str, *, runs: str | Path = "runs") -> Study:
        """Open a study that was run before, to look at it or go on. Raises StudyError where there is none."""
        store = StudyStore.open(Path(runs) / name)
        return cls(store.settings(), store)

    @cached_property
    def dataset(self) -> PatchDataset:
        assert self.settings.data is not None
        return PatchDataset.open(self.settings.data)

    @cached_property
    def labels(self) -> PatchDataset | None:
        """The data set of labelled images, where it is one apart."""
        return None if self.settings.labels is None else PatchDataset.open(self.settings.labels)

    def plan(self, address: str | None = None) -> Plan:
        """Check and price the study, for this machine or for the cluster at `address`; nothing is run."""
        from amlp_ray.runtime.capacity import cluster_resources, machine_resources
        from amlp_ray.runtime.ray_session import ray_session
        from amlp_ray.study.plan import make_plan

        if address is None:
            return make_plan(self.settings, self.dataset, machine_resources(), self.labels)
        with ray_session(address):
            return make_plan(self.settings, self.dataset, cluster_resources(), self.labels)

    def run(self, address: str | None = None, *, notify: Callable[[str], None] = print) -> Study:
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

    def confirm(self, address: str | None = None, *, notify: Callable[[str], None] = print) -> Study:
        """Train the best trials and every arm again over several seeds, score them by both protocols, open the test split.

        The test split is opened once, when all runs are finished; a second call shows what was found then.

        Raises: as `run`, and StudyError where no trial is complete.
        """
        from amlp_ray.study.confirm import confirmation_plan, open_test

        confirmation_plan(self.store, self.settings)  # tells where there is nothing to confirm
        self._run("confirm", address, notify)
        if self.outcome == "done":
            open_test(self.store, self.settings, self.labels or self.dataset, notify=notify)
        return self

    def _run(self, phase: Phase, address: str | None, notify: Callable[[str], None]) -> Study:
        from amlp_ray.data.reading.cache import swept
        from amlp_ray.runtime.capacity import cluster_resources, machine_resources
        from amlp_ray.runtime.ray_session import ray_session
        from amlp_ray.study.driver import EventLog, run_on_tune
        from amlp_ray.study.plan import check_study

        check_study(self.settings, self.dataset, self.labels)
        if address is None:
            self._side_by_side(machine_resources())  # refuse before a cluster is started
        self._check_unchanged()
        begun = (self.store.folder / "study.yaml").is_file()
        self.store.folder.mkdir(parents=True, exist_ok=True)
        if not begun:
            write_yaml(self.settings, self.store.folder / "study.yaml")
        log = EventLog(self.store.folder, notify)
        self.store.storage(patience=self.settings.faults.storage_minutes * 60, notify=log)
        with self.store.lock() as lease, swept():
            self._check_unchanged()
            write_yaml(self.settings, self.store.folder / "study.yaml")
            search = self.store.search()
            search.set_user_attr("budget", self.settings.budget.model_dump(mode="json"))
            search.set_user_attr("request", None)
            with ray_session(address) as session:
                cluster = cluster_resources()
                side_by_side = self._side_by_side(cluster)
                self._note_environment(cluster)
                log(f"study {self.settings.name}: {side_by_side} trials side by side, folder {self.store.folder}")
                if phase == "search":
                    self._note_pruning(log)
                if session.dashboard:
                    log(f"Ray dashboard: {session.dashboard}")
                self.outcome = run_on_tune(
                    self.store,
                    self.settings,
                    lease,
                    log,
                    data=self.dataset.path,
                    labels=None if self.labels is None else self.labels.path,
                    images=self.dataset.count("train"),
                    side_by_side=side_by_side,
                    phase=phase,
                )
        return self

    def _note_environment(self, cluster: Cluster) -> None:
        """Keep what this run is run with: of the first in environment.json, of all in environments.jsonl."""
        found = environment(self.settings, self.dataset, cluster, self.labels, folder=self.store.folder)
        first = self.store.folder / "environment.json"
        if not first.exists():
            write_whole(first, json.dumps(found, indent=1))
        with (self.store.folder / "environments.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")

    def _note_pruning(self, log: Callable[[str], None]) -> None:
        base, pruner = self.settings.trial({}, seed=0), self.settings.pruner
        if pruner.name == "none":
            return
        if not prunable_rungs(base, pruner, self.dataset.count("train")):
            log(f"note: trials are too short for anything to be pruned (pruner.min_steps={pruner.min_steps})")
        elif pruner.schedule == "fixed" and base.ratio.shape != "fixed":
            log(
                "note: the masking ratio's schedule spans all epochs, so an early rung has seen its beginning only "
                "(pruner.schedule=compress runs it whole up to each rung)"
            )

    def _side_by_side(self, cluster: Cluster) -> int:
        from amlp_ray.runtime.capacity import jobs_side_by_side

        return jobs_side_by_side(self.settings.resources, cluster)

    def _check_unchanged(self) -> None:
        if not (self.store.folder / "study.yaml").is_file():
            return
        about = self.store.folder / "environment.json"
        if about.is_file():
            held = json.loads(about.read_text())
            for name, now in (("dataset", self.dataset), ("labels", self.labels)):
                fingerprint = None if now is None else now.manifest.fingerprint
                if fingerprint != (held.get(name) or {}).get("fingerprint"):
                    what = "labels" if name == "labels" else "data"
                    raise StudyError(
                        f"Study {self.settings.name!r} in {self.store.folder.parent} was begun on other {what} than "
                        + (f"{self.dataset.path} has of its own" if now is None else f"{now.path} holds now")
                        + f"; restore the {what}, or give the study another name."
                    )
        ours, theirs = flat(self.settings), flat(self.store.settings())
        changed = sorted(
            name
            for name in ours.keys() | theirs.keys()
            if ours.get(name) != theirs.get(name) and not name.startswith(CHANGEABLE)
        )
        if changed:
            name = changed[0]
            raise StudyError(
                f"Study {self.settings.name!r} in {self.store.folder.parent} was begun with other settings: {name} was "
                f"{theirs.get(name)!r} and is now {ours.get(name)!r}"
                + (f" ({len(changed) - 1} more differ)" if len(changed) > 1 else "")
                + "; give the study another name, or restore the setting. Budget and resources may change."
            )

    # Looking

    @property
    def best_trial(self) -> FrozenTrial:
        """The COMPLETE trial of the search with the highest DSC. Raises StudyError where there is none."""
        done = self.store.search().get_trials(states=(TrialState.COMPLETE,))
        if not done:
            raise StudyError(f"Study {self.settings.name!r} has no complete trial yet; see `amlp-ray study status`.")
        return max(done, key=lambda trial: (trial.value, -trial.number))

    def trials_dataframe(self) -> pd.DataFrame:
        """All trials, arms included: kind, number, state, dsc, epochs, seconds, and one column per searched setting."""
        import pandas as pd

        return pd.DataFrame(self.trials())

    def trials(self) -> list[dict[str, Any]]:
        """All trials as plain rows, arms after the search."""
        storage = self.store.storage()
        rows = []
        for kind, study in (("search", self.store.search(storage)), ("arm", self.store.arms(storage))):
            for trial in study.get_trials(deepcopy=False):
                values = trial.intermediate_values
                attrs = trial.user_attrs
                rows.append(
                    {
                        "kind": kind if kind == "search" else attrs.get("arm", "arm"),
                        "number": trial.number if kind == "search" else attrs.get("repeat", trial.number),
                        "state": trial.state.name,
                        "dsc": values[max(values)] if values else None,
                        "epochs": attrs.get("epochs", max(values, default=0)),
                        "seconds": attrs.get("seconds"),
                        "reason": attrs.get("reason"),
                        **{name: trial.params.get(name) for name in self.settings.space},
                    }
                )
        return rows

    def status(self) -> dict[str, Any]:
        """Counts by state, best score, and the arms' means."""
        rows = self.trials()
        states: dict[str, int] = {}
        for row in rows:
            if row["kind"] == "search":
                states[row["state"]] = states.get(row["state"], 0) + 1
        done = [r["dsc"] for r in rows if r["kind"] == "search" and r["state"] == "COMPLETE"]
        arms: dict[str, list[float]] = {}
        for row in rows:
            if row["kind"] != "search" and row["state"] == "COMPLETE":
                arms.setdefault(row["kind"], []).append(row["dsc"])
        return {
            "study": self.settings.name,
            "folder": str(self.store.folder),
            "budget": self.settings.budget.trials,
            "running_now": self.store.is_run(),  # RUNNING trials of a study that nobody runs are taken over by `run`
            "states": states,
            "best_dsc": max(done, default=None),
            "arms": {arm: {"n": len(v), "dsc": sum(v) / len(v)} for arm, v in arms.items()},
        }

    def report(self) -> Path:
        """Write `report.html` and return its path."""
        from amlp_ray.study.report import write_report

        return write_report(self.store)


def _trial_name(config: dict[str, Any]) -> str:
    task = config["task"]
    return f"{task['study']}-{task['label'].replace(' ', '-')}"
