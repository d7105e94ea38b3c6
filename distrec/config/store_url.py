"""Addresses of stores: which are understood; and that no address carries a secret."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

SCHEMES = ("s3", "hdfs", "file")
# what pyarrow needs to know of an S3-like store; keys and tokens come from the environment
S3_OPTIONS = ("region", "endpoint_override", "scheme")

_PASSWORD = re.compile(r"://[^/?#\s\"]*:[^/?#\s\"]*@")


def refuse_passwords(text: str) -> None:
    """Refuse text with an address such as s3a://key:secret@bucket, without repeating it.

    Raises:
        ValueError: There is one.
    """
    if _PASSWORD.search(text):
        raise ValueError(
            "addresses hold no passwords, for manifests repeat them. Received: one with a "
            "password. Give Spark its credentials by its own configuration or the environment"
        )


def checked_url(url: str) -> str:
    """The address, if it is one of a store; nothing is opened.

    The message of an error never repeats the address, which may hold a secret.

    Raises:
        ValueError: It is not.
    """
    try:
        parts = urlsplit(url)
        options = [key for key, _ in parse_qsl(parts.query, True, True)] if parts.query else []
    except ValueError:
        raise ValueError("a store is an address. Received: something else") from None
    if "@" in parts.netloc or parts.fragment:
        raise ValueError(
            "the address of a store holds no user, key or password: it is in logs, manifests and "
            "reports. Received: one with them. Put credentials into the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, HADOOP_USER_NAME)"
        )
    if parts.scheme not in SCHEMES:
        raise ValueError(
            "a store is s3://bucket/path, hdfs://host:port/path or file:///path. Received: an "
            f"address that begins with {parts.scheme[:20]!r}. Mount or copy other stores"
        )
    unknown = sorted(set(options) - set(S3_OPTIONS if parts.scheme == "s3" else ()))
    if unknown:
        raise ValueError(
            f"the options of an s3 address are {', '.join(S3_OPTIONS)}; others have none. "
            f"Received: {', '.join(unknown)}. Remove them, and put credentials into the environment"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("file:///path has three slashes. Received: another number")
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"{parts.scheme}:// is followed by a name. Received: none")
    if ".." in parts.path.split("/"):
        raise ValueError("the path of a store goes down only. Received: ..")
    return url


def shown(url: str, *names: str) -> str:
    """The address of something below a store, for messages: without the options."""
    return "/".join([url.partition("?")[0].rstrip("/"), *names])
