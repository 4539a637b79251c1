"""What a study's run says is kept in its folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from amlp_ray.study.execution.study_log import log_events

logger = logging.getLogger("amlp_ray.study.test")


def test_messages_are_kept_with_their_time_only_while_the_study_runs(tmp_path: Path) -> None:
    level = logging.getLogger("amlp_ray").level
    logger.info("before")
    with log_events(tmp_path):
        logger.info("trial %d starts", 3)
        logger.debug("detail")
        logging.getLogger("elsewhere").warning("not ours")
    logger.info("after")
    (line,) = (tmp_path / "events.log").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d trial 3 starts", line)
    assert logging.getLogger("amlp_ray").level == level


def test_a_file_that_cannot_be_written_loses_a_message_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "events.log").mkdir()
    with log_events(tmp_path):
        logger.info("lost")


def test_messages_are_printed_where_nobody_has_set_up_logging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with log_events(tmp_path):
        logger.info("trial 3 starts")
    assert capsys.readouterr().out == "trial 3 starts\n"
