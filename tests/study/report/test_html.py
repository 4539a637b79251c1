import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from helpers.finished_studies import (
    SPACE,
    add_baseline,
    add_picture,
    add_trial,
    new_study,
    write_files,
)
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config import Choice, StudyConfig
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.report import write_report
from amlp_ray.study.report.comparison import paired_scores
from amlp_ray.study.report.report_data import collect, count_states
from amlp_ray.study.storage.study_store import StudyStore

ALL_HEADINGS = {
    "Verdict",
    "Best trial, baselines and floors",
    "Best trial",
    "What was searched",
    "How the search went",
    "Do early scores rank trials?",
    "Which settings matter",
    "Budget and time",
    "While pretraining",
    "Pictures",
    "All trials",
    "Environment",
}


def full_study(folder: Path, **config) -> StudyStore:
    """Create a study of every state of trials, with conditional parameters and baselines."""
    store = new_study(folder, **config)
    for i in range(14):
        add_trial(store, 0.42 + 0.007 * i, power=i % 3 == 0)
    for i in range(5):
        add_trial(store, 0.40 + 0.01 * i, state="PRUNED", power=i % 2 == 0)
    add_trial(store, 0.0, state="FAIL")
    add_trial(store, 0.47, state="RUNNING")
    for repeat, dsc in enumerate((0.455, 0.47)):
        add_baseline(store, "mae", repeat, dsc)
        add_baseline(store, "scratch", repeat, dsc - 0.04)
    add_picture(store.trial_folder(13), "case_0.png")
    add_picture(store.folder / "baselines" / "mae-0", "case_0.png")
    return store


def headings(page: str) -> set[str]:
    return set(re.findall(r"<h2>(.*?)</h2>", page))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> StudyStore:
    return full_study(tmp_path_factory.mktemp("runs") / "ratio")


@pytest.fixture(scope="module")
def page(full: StudyStore) -> str:
    return write_report(full).read_text()


def test_facts_are_those_of_the_store(full: StudyStore) -> None:
    data = collect(full)
    assert count_states(data.search) == {
        "COMPLETE": 14,
        "PRUNED": 5,
        "FAIL": 1,
        "INTERRUPTED": 1,
    }  # nobody runs it
    assert data.best is not None
    assert data.best.number == 13
    assert data.best.measure("ppv") == 0.55
    assert data.best.measure("empty_correct") is None
    assert len(data.best.per_group()) == 60
    assert data.parameter_names() == list(SPACE)
    assert data.steps_per_epoch(data.best) == 104 // 16
    assert data.search[14].dsc == pytest.approx(0.35)  # pruned: its last rung
    assert data.search[19].dsc is None  # failed
    assert data.search[20].dsc == pytest.approx(0.395)  # running: its only rung
    assert sum(data.importances["dsc"].shares.values()) == pytest.approx(1)
    assert (
        "ratio.power" in data.importances["dsc"].shares
    )  # conditional parameters are assessed too


def test_page_has_every_section_and_every_run(page: str) -> None:
    assert headings(page) == ALL_HEADINGS
    for name in ("trial 0", "trial 20", "mae-1", "scratch-0"):
        assert f">{name}</td>" in page
    assert "Loss became NaN in epoch 3." in page
    assert "21: 14 COMPLETE, 5 PRUNED, 1 FAIL, 1 INTERRUPTED" in page
    assert "train 104 images" in page
    assert "versions.torch" in page
    assert "from amlp_ray import load_encoder" in page
    assert "0.5 to 3, logarithmic" in page
    assert "ratio.shape is power" in page
    assert page.count('<img src="data:image/png;base64,') == 2
    assert page.count('class="plotly-graph-div"') == 9


def test_page_loads_nothing_from_elsewhere(page: str) -> None:
    tags = re.findall(r"<(?:script|img|link|iframe|source|object)\b[^>]*>", page)
    assert tags
    assert not [tag for tag in tags if re.search(r"\s(?:src|href)=(?!\"data:)", tag)]
    assert "@import" not in page.split("</style>")[0]
    assert page.count("plotly.js v") == 1  # inlined once for all figures


def test_writing_replaces_the_old_report_and_leaves_no_other_file(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    store.folder.joinpath("report.html").write_text("old")
    before = {path.name for path in store.folder.iterdir()}
    assert write_report(store) == store.folder / "report.html"
    assert {path.name for path in store.folder.iterdir()} == before
    assert store.folder.joinpath("report.html").read_text().startswith("<!DOCTYPE html>")


def test_report_leaves_the_journal_as_it_is(tmp_path: Path) -> None:
    store = StudyStore(tmp_path / "s")
    store.folder.mkdir()
    write_yaml(StudyConfig(name="s"), store.folder / "study.yaml")
    optuna.create_study(
        storage=store.storage(), study_name="s", direction="maximize"
    )  # the driver made no baselines yet
    assert not store.is_run()
    before = store.folder.joinpath("study.journal").read_bytes()
    write_report(store)
    assert store.folder.joinpath("study.journal").read_bytes() == before


def test_study_without_trials_has_a_page(tmp_path: Path) -> None:
    page = write_report(new_study(tmp_path / "s")).read_text()
    assert headings(page) == ALL_HEADINGS
    assert "No trial has started yet" in page
    assert len(page) < 50_000  # no figure, so no plotly.js


def test_study_folder_with_settings_alone_has_a_page(tmp_path: Path) -> None:
    store = StudyStore(tmp_path / "s")
    store.folder.mkdir()
    write_yaml(StudyConfig(name="s"), store.folder / "study.yaml")
    page = write_report(store).read_text()
    assert headings(page) == ALL_HEADINGS
    assert "holds no environments.jsonl" in page


def test_one_trial_alone_has_a_page(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, 0.5)
    page = write_report(store).read_text()
    assert "Trial 0, DSC 0.500, after 100 epochs." in page
    assert "1 complete trials are too few" in page


def test_all_failed_says_so(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    for _ in range(3):
        add_trial(store, 0.0, state="FAIL")
    page = write_report(store).read_text()
    assert "Every trial has failed (3 FAIL)" in page
    assert headings(page) == ALL_HEADINGS


def test_missing_and_broken_files_are_taken_as_absent(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    folder = add_trial(store, 0.5)
    shutil.rmtree(folder)
    broken = add_trial(store, 0.6)
    broken.joinpath("score.json").write_text('{"dsc": 0.6, "ppv"')
    broken.joinpath("metrics.jsonl").write_text('{"epoch": 1, "loss": NaN, "ratio": 0.3}\n{"epo')
    store.folder.joinpath("environments.jsonl").write_text("[]")
    add_baseline(store, "mae", 0, 0.5).joinpath("config.yaml").unlink()
    page = write_report(store).read_text()
    assert "Trial 1, DSC 0.600" in page
    assert "there is no interval" in page


def test_path_outside_of_the_study_is_not_read(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    write_files(tmp_path / "elsewhere", 0.9)
    add_trial(store, 0.5)
    trial: FrozenTrial = create_trial(
        state=TrialState.COMPLETE, value=0.6, user_attrs={"path": "../elsewhere"}
    )
    store.search(create=True).add_trial(trial)
    assert collect(store).search[1].path == store.trial_folder(1)


def test_texts_of_the_store_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>window.hacked=1</script><img src=x onerror=alert(1)>"
    store = new_study(
        tmp_path / "s",
        description=evil,
        pretrain={},
        space={**SPACE, evil: Choice(choices=[evil, "b"])},
    )
    for i in range(2):
        distributions = {evil: CategoricalDistribution([evil, "b"])}
        store.search(create=True).add_trial(
            create_trial(
                value=0.5 + i / 10,
                params={evil: evil},
                distributions=distributions,
                intermediate_values={5: 0.4},
            )
        )
    store.search(create=True).add_trial(
        create_trial(state=TrialState.FAIL, user_attrs={"reason": evil})
    )
    store.baselines(create=True).add_trial(
        create_trial(value=0.4, user_attrs={"baseline": evil, "repeat": 0, "path": "baselines/x"})
    )
    write_files(store.folder / "trials/1", 0.6)
    write_files(store.folder / "baselines/x", 0.4)
    store.trial_folder(1).joinpath("config.yaml").write_text(evil)
    store.folder.joinpath("environments.jsonl").write_text(
        json.dumps({evil: evil, "dataset": {"name": evil}})
    )
    score = json.loads(store.trial_folder(1).joinpath("score.json").read_text())
    score["per_group"][evil] = 0.1
    store.trial_folder(1).joinpath("score.json").write_text(json.dumps(score))
    add_picture(store.trial_folder(1), "<b>case.png")
    page = write_report(store).read_text()
    assert "window.hacked" in page
    assert "<script>window.hacked" not in page
    assert "<img src=x" not in page
    assert "<b>case" not in page
    assert page.count("<script") == page.count("</script")


def test_scores_are_paired_over_the_groups_that_all_runs_have() -> None:
    best = {f"g{k}": 0.5 + 0.001 * k for k in range(50)}
    baseline = {key: value - 0.1 for key, value in best.items()}
    better = {key: value - 0.05 for key, value in best.items()}
    scores = paired_scores(
        {**best, "only here": 0.0}, [baseline, {**better, "only there": 1.0}, better]
    )
    assert scores.shape == (2, 1, 50)
    assert scores[0] - scores[1] == pytest.approx(0.2 / 3)
    assert paired_scores(best, [{}]).size == 0


def test_a_report_can_be_written_elsewhere(full: StudyStore, tmp_path: Path) -> None:
    before = {path.name for path in full.folder.iterdir()}
    out = write_report(full, tmp_path / "mine.html")
    assert out == tmp_path / "mine.html"
    assert "<html" in out.read_text()
    assert {path.name for path in full.folder.iterdir()} == before


def test_importing_the_report_loads_neither_plotly_nor_jinja() -> None:
    code = "import sys, amlp_ray.study.report; print({'plotly', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_every_figure_and_sorts_the_table(page: str, tmp_path: Path) -> None:
    click = (
        "<script>document.querySelector('table.sortable th:nth-child(3)').click()</script></body>"
    )
    copy = tmp_path / "report.html"
    copy.write_text(page.replace("</body>", click))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        copy.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    drawn = re.findall(r'<div id="plot-(\w+)" class="plotly-graph-div js-plotly-plot"', dom)
    assert set(drawn) == {
        "history",
        "efficiency",
        "ranks",
        "rungs",
        "importances",
        "parallel",
        "timeline",
        "ratio",
        "loss",
    }
    assert dom.count('class="main-svg"') >= 9
    assert headings(dom) == ALL_HEADINGS
    assert "Download plot" in dom  # plotly's buttons are there,
    assert "Share chart" not in dom  # but none that uploads a figure
    table = dom[dom.index('<table class="sortable">') :]
    order = re.findall(r"<tr><td[^>]*>([^<]+)</td><td[^>]*>\w+</td><td[^>]*>([^<]+)</td>", table)
    assert [value for _, value in order[:-1]] == sorted(value for _, value in order[:-1])
    assert order[-1] == ("trial 19", "\u2013")  # what is missing comes last
