"""The errors a user can meet.

A message is one sentence that names the file or key, what was found, what is accepted and what to do.
The command line prints it without a traceback and leaves with `exit_code`.
"""


class AmlpError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class SettingsError(AmlpError):
    """A setting is misspelt, out of range, or contradicts another one."""

    exit_code = 2


class DataError(AmlpError):
    """Images, masks or a patch dataset cannot be used as they are."""

    exit_code = 2


class ResourceError(AmlpError):
    """A request that no node can hold, such as more GPUs than exist."""

    exit_code = 2


class CheckpointError(AmlpError):
    """A checkpoint or an exported encoder is missing, damaged, or belongs to other settings."""

    exit_code = 2


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
