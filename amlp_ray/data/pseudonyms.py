"""Names that say nothing about a patient, yet are the same every time.

A plain hash of a patient's number is no protection: hospitals number their patients with six to ten digits, and all of
these are hashed in seconds and compared. So the hash is keyed with a secret, the salt, which stays with the person who
prepares: whoever has only the dataset cannot test a guess, and two sets prepared with the same salt still agree on who
is who. The salt is never written into a dataset, a log or a message.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from amlp_ray.errors import DataError

ENVIRONMENT = (
    "AMLP_RAY_SALT"  # takes the place of the file, such as for several people who prepare one set
)
SALT_BYTES = 32
DIGITS = 16  # hexadecimal: 64 bits, with which a million series collide once in 37 million sets


def pseudonym(text: str, salt: bytes) -> str:
    """Return 16 hexadecimal digits that stand for `text`: HMAC-SHA256 keyed with `salt`, shortened.

    >>> pseudonym("0012345", b"a secret"), pseudonym("0012345", b"another") == pseudonym("0012345", b"a secret")
    ('c786f83a6e8c9863', False)
    """
    return hmac.new(salt, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[
        :DIGITS
    ]


def salt() -> bytes:
    """Return the secret of this user: the text in `AMLP_RAY_SALT`, else 32 random bytes kept in their configuration.

    The file is made on first use, readable by its owner alone. Asked for where a folder is listed and never by a
    worker: another node may have another home, and would name the same patient differently.

    Raises:
        DataError: the file cannot be made or read, or is not one of ours.
    """
    given = os.environ.get(ENVIRONMENT)
    if given:
        return given.encode("utf-8", "surrogateescape")
    path = _salt_path()
    try:
        if not path.exists():
            _create(path)
        kept = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}, the secret that patients' names are hashed with, cannot be made or read ({error.strerror}); set "
            f"the environment variable {ENVIRONMENT} to a secret text of your own."
        ) from None
    if len(kept) != SALT_BYTES:
        raise DataError(
            f"{path} holds {len(kept)} bytes, but the secret that patients' names are hashed with has {SALT_BYTES}; "
            f"restore it, or delete it for a new one, under which all patients get new names."
        )
    return kept


def _salt_path() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME")
    try:
        base = (
            Path(configured)
            if configured and Path(configured).is_absolute()
            else Path.home() / ".config"
        )
    except RuntimeError:  # an account without a home
        raise DataError(
            f"This account has no home folder to keep the secret in that patients' names are hashed with; set the "
            f"environment variable {ENVIRONMENT} to a secret text of your own."
        ) from None
    return base / "amlp_ray" / "salt"


def _create(path: Path) -> None:
    """Make the file unless someone else just did: a link to a complete file appears at once, or not at all."""
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
