"""Errors that a user can meet.

A message is one sentence that names the file or key, what was found, what is accepted and what to
do. The command line prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence


class AmlpError(Exception):
    """Base of every error raised on purpose; the command line exits with its `exit_code`."""

    exit_code = 1

    @property
    def messages(self) -> tuple[str, ...]:
        """The sentences of the message; the command line prints each on a line."""
        return (str(self),)


class ConfigError(AmlpError, ValueError):
    """Settings are misspelled, out of range, or contradict each other: one sentence per problem.

    It is a ValueError too, so that pydantic lists what a validator raises with a model's other
    problems.

    Args:
        messages: one sentence per problem.
        keys: dotted name of the setting that each message is about; `ConfigSource` finds the line
            of a file by it.
    """

    exit_code = 2

    def __init__(self, *messages: str, keys: Sequence[str] = ()) -> None:
        super().__init__(" ".join(messages))
        self._messages = messages
        self.keys = tuple(keys) or ("",) * len(messages)

    @property
    def messages(self) -> tuple[str, ...]:
        return self._messages


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
    """A run lost workers or nodes more often than `fault_tolerance.max_failures` allows."""


class StorageError(AmlpError):
    """A run's folder was full or unreachable for longer than `fault_tolerance.storage_minutes`.

    What was trained up to then is kept.
    """


class StudyError(AmlpError):
    """A study cannot be found, opened, or resumed as requested."""

    exit_code = 2


class FailedStudyError(AmlpError):
    """A study used its budget and no trial completed."""


class InterruptedStudyError(AmlpError):
    """Ctrl-C ended a run of a study; its next run takes over the running trials."""

    exit_code = 130


class ClusterLostError(AmlpError):
    """The Ray cluster that a study runs on is gone; its next run takes over the running trials."""


class NonFiniteLossError(AmlpError):
    """The loss became NaN or infinite; the message names epoch and step."""


def describe_error(error: BaseException) -> str:
    """Return an error's message in one line of at most 200 characters, or its type if it has none.

    >>> describe_error(ValueError("no\\n  luck."))
    'no luck'
    """
    message = " ".join(str(error).split()).rstrip(".")
    return message[:200] or type(error).__name__
