"""Check a patch dataset before anything is trained on it, with examples to look at."""

from __future__ import annotations

from amlp_ray.data.check.finding import SEVERITIES, Example, Finding, ImageRef, Severity
from amlp_ray.data.check.report import Report, check_dataset

__all__ = ["SEVERITIES", "Example", "Finding", "ImageRef", "Report", "Severity", "check_dataset"]
