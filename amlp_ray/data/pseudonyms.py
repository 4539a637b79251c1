"""Hash names so that they say nothing about a patient, yet are the same every time.

A plain hash of a patient's number is no protection. Hospitals number their patients with six to ten
digits, and all of these are hashed in seconds and compared. So the hash is keyed with a secret, the
salt, which stays with the person who prepares. Whoever has only the dataset cannot test a guess,
and two sets prepared with the same salt still agree on who is who. The salt is never written into a
dataset, a log or a message.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from amlp_ray.errors import DataError

# Takes the place of the file, as for several people who prepare one set.
ENVIRONMENT = "AMLP_RAY_SALT"
SALT_BYTES = 32
# Hexadecimal, so 64 bits: a million series collide once in 37 million sets.
DIGITS = 16


def pseudonym(text: str, salt: bytes) -> str:
    """Return 16 hexadecimal digits that stand for `text`: HMAC-SHA256 keyed with `salt`, shortened.

    >>> pseudonym("0012345", b"a secret")
    'c786f83a6e8c9863'
    """
    message = text.encode("utf-8", "surrogatepass")
    return hmac.new(salt, message, hashlib.sha256).hexdigest()[:DIGITS]


def salt() -> bytes:
    """Return the secret of this user: `AMLP_RAY_SALT`, else 32 random bytes in a file.

    The file is made on first use, readable by its owner alone. Call this where a folder is listed
    and never in a worker: another node may have another home, and would name the same patient
    differently.

    Raises:
        DataError: the file cannot be made or read, or holds something else.
    """
    variable = os.environ.get(ENVIRONMENT)
    if variable:
        return variable.encode("utf-8", "surrogateescape")
    path = _salt_path()
    try:
        if not path.exists():
            _create(path)
        secret = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}, the secret that patients' names are hashed with, cannot be made or read "
            f"({error.strerror}); set the environment variable {ENVIRONMENT} to a secret text of "
            "your own."
        ) from None
    if len(secret) != SALT_BYTES:
        raise DataError(
            f"{path} holds {len(secret)} bytes, but the secret that patients' names are hashed "
            f"with has {SALT_BYTES}; restore it, or delete it for a new one, under which all "
            "patients get new names."
        )
    return secret


def _salt_path() -> Path:
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    try:
        if not folder.is_absolute():
            folder = Path.home() / ".config"
        return folder / "amlp_ray" / "salt"
    except RuntimeError:  # an account without a home
        raise DataError(
            "This account has no home folder to keep the secret in that patients' names are "
            f"hashed with; set the environment variable {ENVIRONMENT} to a secret text of your own."
        ) from None


def _create(path: Path) -> None:
    """Make the file unless another process just did.

    A link to a complete file appears at once or not at all, so no process reads half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".salt.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SALT_BYTES))
            file.flush()
            os.fsync(file.fileno())  # a salt lost in a power cut would rename every patient
        with suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
