"""StudyConfig refuses passwords, names that a database mistakes, and elastic workers."""

import pytest

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@db/x",
        "postgresql://me:pa/ss@db/x",
        "mysql://me:s3c/ret@db/x",
        "postgresql://me@db/x?password=secret",
        "postgresql://db/x?user=me&password=secret",
        "mysql://me:${WORD}@db/x?passwd=secret",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="a password stands in the URL") as refused:
        build(StudyConfig, {"name": "s", "storage": url}, "study.yaml")
    assert not any(word in str(refused.value) for word in ("secret", "pa/ss", "s3c"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:${WORD}@db/x",
        "postgresql://me@db/x?sslmode=require",
        "postgresql://db/x?user=me&password=${WORD}",
        "sqlite:///folder/study.db",
    ],
)
def test_a_url_without_a_password_is_accepted(url: str) -> None:
    assert build(StudyConfig, {"name": "s", "storage": url}, "study.yaml").storage == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "a database in memory is gone with its process"),
        ("sqlite:///:memory:", "a database in memory is gone with its process"),
        ("sqlite:///file:x?mode=memory", "a database in memory is gone with its process"),
        ("sqlite:///file::memory:?cache=shared", "the URL names no SQLite file"),
        ("sqlite:///file:x.db?uri=true", "the URL names no SQLite file"),
        ("sqlite:///", "the URL names no SQLite file"),
        ("sqlite:///folder/", "the URL names no SQLite file"),
        ("sqlite://trials.db", "the URL names no SQLite file"),
        ("trials.db", "must begin with sqlite:///"),
        (":memory:", "must begin with sqlite:///"),
    ],
)
def test_a_database_that_no_other_process_finds_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(StudyConfig, {"name": "s", "storage": url}, "study.yaml")


@pytest.mark.parametrize("name", ["low.baselines", "low.confirm", "low.v2"])
def test_a_name_that_a_database_takes_for_a_companion_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="ends as the companions of a study do"):
        build(StudyConfig, {"name": name}, "study.yaml")


def test_workers_that_follow_the_nodes_are_refused_inside_a_study_with_the_reason() -> None:
    with pytest.raises(
        ConfigError,
        match=r"resources: workers \[2, 8\] follow the nodes, but a trial needs a number",
    ) as no:
        build(StudyConfig, {"name": "s", "resources": {"workers": [2, 8]}}, "study.yaml")
    assert "counts what nodes hold, not what other trials use of it" in str(no.value)
    assert (
        build(
            StudyConfig, {"name": "s", "resources": {"workers": 2}}, "study.yaml"
        ).resources.workers
        == 2
    )


@pytest.mark.parametrize("name", ["arms", "faults", "labels", "arm_seeds", "ema"])
def test_a_name_that_is_near_to_none_gets_no_hint(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(StudyConfig, {"name": "s", name: 1}, "study.yaml")
    message = str(refused.value)
    assert f"unknown setting '{name}'; known here: name, description, data, " in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sed", "did you mean seed?"),
        ("budgets", "did you mean budget?"),
        ("fault_tolerence", "did you mean fault_tolerance?"),
        ("gpu_hours", "did you mean budget.gpu_hours?"),
        ("seeds", "similar here: seed, baseline_seeds."),
    ],
)
def test_a_name_near_to_others_gets_them_as_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(StudyConfig, {"name": "s", name: 1}, "study.yaml")
    assert str(refused.value) == f"study.yaml: unknown setting '{name}'; {hint}"
