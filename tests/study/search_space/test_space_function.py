"""A space that is a Python function is imported only where it is allowed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from optuna.trial import Trial

from amlp_ray.cli import main
from amlp_ray.errors import ConfigError
from amlp_ray.study.operations.transfer import import_trials
from amlp_ray.study.search_space.space_function import load_function
from amlp_ray.study.search_space.validate import build_study
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.study import Study


def ratio_space(trial: Trial) -> None:
    """Ask for one setting."""
    trial.suggest_float("ratio.start", 0.1, 0.5)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return the name of a module in the working directory that leaves a mark when it is run."""
    name = f"planted_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(
        "from pathlib import Path\n"
        "Path(__file__).with_name('mark').touch()\n"
        "def space(trial):\n"
        "    trial.suggest_float('ratio.start', 0.1, 0.5)\n"
    )
    (tmp_path / "s.yaml").write_text(f"name: s\nspace: {name}:space\n")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(
    "command",
    [
        ["validate", "s.yaml"],
        ["plan", "s.yaml", "--data", "data"],
        ["run", "s.yaml", "--data", "data"],
        ["enqueue", "s.yaml", "ratio.start=0.3"],
        ["import", "s.yaml", "prior.csv"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_runs_code_unasked(
    command: list[str],
    planted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "study", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"amlp-ray: s.yaml:2: space: {planted}:space is Python code, which is ")
    assert "--allow-code" in line
    assert not Path("mark").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize("way", ["option", "environment"])
def test_code_that_is_allowed_is_run_and_told_of(
    way: str,
    planted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = ["--allow-code"] if way == "option" else []
    if way == "environment":
        monkeypatch.setenv("AMLP_RAY_ALLOW_CODE", "1")
    monkeypatch.setattr(sys, "argv", ["amlp-ray", "study", "validate", "s.yaml", *option])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    assert printed.err == f"the space is Python code, which is run: {planted}:space\n"
    assert Path("mark").exists()


def test_python_asks_for_it_too(planted: str) -> None:
    with pytest.raises(ConfigError, match="allow_code=True in Python"):
        Study.create(name="s", data="data", space=f"{planted}:space")
    assert not Path("mark").exists()
    study = Study.create(name="s", data="data", space=f"{planted}:space", allow_code=True)
    assert study.config.space == f"{planted}:space"
    assert Path("mark").exists()


def test_a_module_that_is_in_use_already_is_no_way_around_it() -> None:
    with pytest.raises(ConfigError, match="os:listdir is Python code"):
        build_study({"name": "s", "space": "os:listdir"}, "study.yaml")


def test_a_function_that_is_passed_as_such_is_allowed() -> None:
    config = build_study({"name": "s", "space": ratio_space}, "test")
    assert config.space == f"{__name__}:ratio_space"


def test_a_module_that_is_not_there_is_told(planted: str) -> None:
    values = {"name": "s", "space": "no_such_module:space"}
    with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
        build_study(values, "study.yaml", should_allow_code=True)
    with pytest.raises(ConfigError, match="is Python code"):
        load_function(f"{planted}:space")


def test_an_import_asks_for_the_other_studys_function_too(planted: str, tmp_path: Path) -> None:
    declared = {"name": "own", "space": {"ratio.start": {"low": 0.1, "high": 0.5}}}
    config = build_study(declared, "test")
    other = StudyStore(tmp_path / "runs" / "other")
    other.folder.mkdir(parents=True)
    (other.folder / "study.yaml").write_text(f"name: other\nspace: {planted}:space\n")
    store = StudyStore(tmp_path / "runs" / "own")
    with pytest.raises(ConfigError, match="is Python code"):
        import_trials(store, config, "other")
    assert not Path("mark").exists()
    assert import_trials(store, config, "other", allow_code=True).taken == []
    assert Path("mark").exists()
