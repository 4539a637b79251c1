"""Settings of where a run's figures go besides its own folder."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, field_validator

from amlp_ray.config.base import Config

_SCHEMES = ("http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql")


class TrackingConfig(Config):
    """Where a run is followed. TensorBoard's files always lie in its folder; nothing leaves the folder unasked.

    What is sent is the settings and the figures of every epoch: no image, no code, no path, no name of a machine.
    """

    # URI of an MLflow server or of its database, such as http://mlflow:5000 or sqlite:////data/mlflow.db; user and
    # password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; none: no MLflow
    mlflow: str | None = None
    experiment: str = Field("amlp-ray", min_length=1)  # of MLflow, in which its runs are listed
    # project of Weights & Biases, or entity/project; the key comes from `wandb login` or WANDB_API_KEY, and with
    # WANDB_MODE=offline all stays on disk until `wandb sync`; none: no W&B
    wandb: str | None = None

    @field_validator("mlflow")
    @classmethod
    def _check_mlflow(cls, given: str | None) -> str | None:
        if given is None or given == "databricks":
            return given
        parts = urlsplit(given)
        # Never shown in these messages: passwords.
        options = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
        user = (
            parts.username if parts.scheme.startswith("http") else None
        )  # a token may stand there
        if (
            user
            or parts.password is not None
            or any(re.search("(?i)pass|pwd|token|secret", o) for o in options)
        ):
            raise ValueError(
                "a password stands in the URI; leave it out and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
            )
        scheme = parts.scheme.partition("+")[0]
        if scheme not in _SCHEMES:
            raise ValueError(
                f"the URI must begin with one of {', '.join(_SCHEMES)} and ://; MLflow no longer writes plain folders, "
                f"so name a file as sqlite:////data/mlflow.db"
            )
        if scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError(
                "the file must be named from / on, with four strokes as in sqlite:////data/mlflow.db: workers run in "
                "folders of their own"
            )
        return given

    @field_validator("wandb")
    @classmethod
    def _check_wandb(cls, given: str | None) -> str | None:
        if given is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", given):
            raise ValueError(
                f"{given!r} is no project, such as lesions, nor entity/project, such as our-lab/lesions"
            )
        return given
