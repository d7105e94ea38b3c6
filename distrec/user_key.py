"""Keyed hashing of users: their ids are HMACs, which nobody without the key has from the raw ones.

The key comes from the environment or from a file, and is written nowhere. The manifest has a keyed
digest of a constant, by which a wrong key is found before any work.

Source: RFC 2104 (HMAC), with SHA-256 cut to its first 128 bits.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from distrec.config import PrepareConfig
from distrec.errors import ConfigError

ENVIRONMENT = "DISTREC_USER_KEY"
MIN_KEY_BYTES = 16
_CONSTANT = "distrec: the key of users"
_DIGEST_BYTES = 16
_FIX = f"Set {ENVIRONMENT}, or prepare.user_key_file, to the key."


def hashed(value: str, key: bytes) -> str:
    """The id of a user: 32 hexadecimal digits.

    Example:
        >>> hashed("7", b"0123456789abcdef")
        'f69cf4852626eee19b92af564b9413e4'
    """
    return hmac.digest(key, value.encode(), "sha256")[:_DIGEST_BYTES].hex()


def key_digest(key: bytes | None) -> str:
    """What the manifest says of a key; "" without one."""
    return "" if key is None else hashed(_CONSTANT, key)


def read_user_key(prepare: PrepareConfig) -> bytes | None:
    """The key of prepare.hash_users; None when users keep the ids that they have.

    Raises:
        ConfigError: There is no key, or a short one.
    """
    return _read(prepare) if prepare.hash_users else None


def key_of_dataset(digest: str, prepare: PrepareConfig) -> bytes | None:
    """The key with which the users of a dataset were hashed; None when they were not.

    Args:
        digest: DatasetManifest.user_key_digest.
        prepare: Says where the key is.

    Raises:
        ConfigError: There is no key, or another one.
    """
    if not digest:
        return None
    key = _read(prepare)
    check_same_key(key, digest)
    return key


def check_same_key(key: bytes | None, digest: str) -> None:
    """Refuse another key than that of a dataset, or one where it has none, or none where it has.

    Raises:
        ConfigError: With what differs.
    """
    if not hmac.compare_digest(key_digest(key), digest):
        received = "no key" if key is None else "another key" if digest else "a key"
        wanted = "hashed with a key" if digest else "not hashed"
        raise ConfigError(
            f"the users of a dataset keep their ids, which are {wanted}. Received: {received}. "
            + (_FIX if digest else "Unset prepare.hash_users.")
        )


def _read(prepare: PrepareConfig) -> bytes:
    path = prepare.user_key_file
    try:
        text = os.environ.get(ENVIRONMENT, "") if path is None else Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"prepare.user_key_file holds the key of users. Received: {type(error).__name__} "
            f"({path}). Check the path and its permissions."
        ) from None
    key = text.strip().encode()
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"the key of users has {MIN_KEY_BYTES} bytes or more, at random, such as `openssl rand "
            f"-hex 32` gives. Received: {len(key)} bytes. {_FIX}"
        )
    return key
