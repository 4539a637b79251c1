"""Requests to the process that runs a study: pause, stop, cancel.

They are a list in a user attribute of the search, so that of several that come at once none is
lost, and everybody who asked finds the answer to the own one. The list is changed only while the
study's change lock is held.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal, NotRequired, TypedDict, cast

import optuna

from amlp_ray.study.storage.lease import here

Verb = Literal["pause", "stop", "cancel"]
ATTRIBUTE = "requests"
KEPT = 50  # answered requests, for those who still wait to read the answer


class Request(TypedDict):
    """One request."""

    verb: Verb
    by: str  # the process that asked
    id: str
    answer: NotRequired[str]  # when the driver received it


def read_requests(study: optuna.Study) -> list[Request]:
    """Read all requests since the study was last started, in order."""
    stored: Any = study.user_attrs.get(ATTRIBUTE)
    requests = stored if isinstance(stored, list) else []
    return [cast(Request, item) for item in requests if _is_request(item)]


def pending_requests(study: optuna.Study) -> list[Request]:
    """Read the requests that the driver has not answered."""
    return [request for request in read_requests(study) if "answer" not in request]


def add_request(study: optuna.Study, verb: Verb) -> str:
    """Add a request and return its id."""
    requests = read_requests(study)
    answered = [request for request in requests if "answer" in request]
    dropped = {request["id"] for request in answered[:-KEPT]}
    request = Request(verb=verb, by=here(), id=uuid.uuid4().hex)
    remaining = [item for item in requests if item["id"] not in dropped]
    study.set_user_attr(ATTRIBUTE, [*remaining, request])
    return request["id"]


def answer_requests(study: optuna.Study, ids: set[str], when: str) -> None:
    """Store that the driver has received requests."""
    requests = read_requests(study)
    for request in requests:
        if request["id"] in ids:
            request["answer"] = when
    study.set_user_attr(ATTRIBUTE, requests)


def clear_requests(study: optuna.Study) -> None:
    """Forget requests to an earlier run, which the next one must not obey."""
    study.set_user_attr(ATTRIBUTE, [])


def _is_request(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    return item.get("verb") in ("pause", "stop", "cancel") and {"by", "id"} <= item.keys()
