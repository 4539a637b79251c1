"""Settings of the experiment trackers that a run's metrics are sent to."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import Field, field_validator

from amlp_ray.config.base import Config

_MLFLOW_SCHEMES = ("http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql")


class TrackingConfig(Config):
    """Where a run is logged. TensorBoard's files are always written into its folder; nothing leaves
    the folder unless it is set here.

    Settings and the metrics of every epoch are sent: no image, no code, no path, no name of a
    machine.
    """

    mlflow: str | None = None
    """URI of an MLflow server or of its database, such as http://mlflow:5000 or
    sqlite:////data/mlflow.db. User and password come from MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD. null: no MLflow."""
    experiment: str = Field("amlp-ray", min_length=1)
    """MLflow's experiment that its runs belong to."""
    wandb: str | None = None
    """Project of Weights & Biases, or entity/project. The key comes from `wandb login` or
    WANDB_API_KEY. With WANDB_MODE=offline everything stays on disk until `wandb sync`. null: no
    W&B."""

    @field_validator("mlflow")
    @classmethod
    def _check_mlflow(cls, uri: str | None) -> str | None:
        """Refuse URIs that MLflow cannot use, and passwords; no message repeats the URI."""
        if uri is None or uri == "databricks":
            return uri
        parts = urlsplit(uri)
        if _has_password(parts):
            raise ValueError(
                "a password stands in the URI; leave it out and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
            )
        scheme = parts.scheme.partition("+")[0]
        if scheme not in _MLFLOW_SCHEMES:
            raise ValueError(
                f"the URI must begin with one of {', '.join(_MLFLOW_SCHEMES)} and ://; MLflow no "
                f"longer writes plain folders, so name a file as sqlite:////data/mlflow.db"
            )
        if scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError(
                "the file must be named from / on, with four strokes as in "
                "sqlite:////data/mlflow.db: workers run in folders of their own"
            )
        return uri

    @field_validator("wandb")
    @classmethod
    def _check_wandb(cls, project: str | None) -> str | None:
        if project is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", project):
            raise ValueError(
                f"{project!r} is no project, such as lesions, nor entity/project, such as "
                f"our-lab/lesions"
            )
        return project


def _has_password(parts: SplitResult) -> bool:
    # The user of an http URI may be a token.
    if parts.password is not None or (parts.username and parts.scheme.startswith("http")):
        return True
    options = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    return any(re.search("(?i)pass|pwd|token|secret", option) for option in options)
