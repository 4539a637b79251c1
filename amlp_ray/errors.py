"""The errors a user can meet.

A message is one sentence that names the file or key, what was found, what is accepted and what to do.
The command line prints it without a traceback and leaves with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence


class AmlpError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1

    @property
    def faults(self) -> tuple[str, ...]:
        """The sentences of the message, a line each on the command line."""
        return (str(self),)


class ConfigError(AmlpError, ValueError):
    """Settings are misspelt, out of range, or contradict each other: one sentence per fault.

    A ValueError too, so that pydantic lists what a validator raises with the other faults of a model.

    Args:
        keys: of each fault, the dotted name of what it is about, from which `Source` tells the line of a file.
    """

    exit_code = 2

    def __init__(self, *faults: str, keys: Sequence[str] = ()) -> None:
        super().__init__(" ".join(faults))
        self._faults = faults
        self.keys = tuple(keys) or ("",) * len(faults)

    @property
    def faults(self) -> tuple[str, ...]:
        return self._faults


class DataError(AmlpError):
    """Images, masks or a patch dataset cannot be used as they are."""

    exit_code = 2


class ResourceError(AmlpError):
    """A request that no node can hold, such as more GPUs than exist."""

    exit_code = 2


class CheckpointError(AmlpError):
    """A checkpoint or an exported encoder is missing, damaged, or belongs to other settings."""

    exit_code = 2


class WorkerLostError(AmlpError):
    """Workers or nodes of a run were lost more often than `fault_tolerance.max_failures` allows."""


class StorageError(AmlpError):
    """A run's folder was full or away for longer than `fault_tolerance.storage_minutes`; what was trained is kept up to then."""


class StudyError(AmlpError):
    """A study cannot be found, opened, or continued as asked."""

    exit_code = 2


class FailedStudyError(AmlpError):
    """A study used its budget and no trial completed."""


class InterruptedStudyError(AmlpError):
    """Ctrl-C ended a run of a study; its running trials will be taken over by the next one."""

    exit_code = 130


class NonFiniteLossError(AmlpError):
    """Training met a loss that is NaN or infinite; the message names epoch and step."""
