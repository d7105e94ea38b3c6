"""The key of users: where it comes from, what it makes of an id, and that another is refused."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

import pytest

from distrec import forget
from distrec.config import PrepareConfig, dump_config, parse_config
from distrec.dataset import MANIFEST, read_manifest
from distrec.errors import ConfigError
from distrec.user_key import (
    ENVIRONMENT,
    check_same_key,
    hashed,
    key_digest,
    key_of_dataset,
    read_user_key,
)
from tests.training import make_config

KEY = "0123456789abcdef-secret"
OTHER = b"another key of some length"


def prepare(**keys: object) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {"events": {"paths": ("none",), "time": "t"}, "hash_users": True, **keys}
    )


def test_ids_are_the_first_half_of_hmac_sha256() -> None:
    # by the definition of RFC 2104, for a key below the block of 64 bytes
    key, text = KEY.encode().ljust(64, b"\0"), "ü 7".encode()
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + text).digest()
    outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).hexdigest()
    assert hashed("ü 7", KEY.encode()) == outer[:32]
    assert hashed("ü 7", OTHER) == hmac.new(OTHER, text, "sha256").hexdigest()[:32]


def test_the_key_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, KEY)
    path = tmp_path / "key"
    path.write_text(f"{OTHER.decode()}\n")
    assert read_user_key(prepare()) == KEY.encode()
    assert read_user_key(prepare(user_key_file=str(path))) == OTHER
    assert read_user_key(prepare(hash_users=False)) is None


def test_keys_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(ConfigError, match=r"16 bytes or more.*Received: 0 bytes"):
        read_user_key(prepare())
    monkeypatch.setenv(ENVIRONMENT, "abc-secret")
    with pytest.raises(ConfigError, match="Received: 10 bytes") as error:
        read_user_key(prepare())
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="user_key_file holds the key"):
        read_user_key(prepare(user_key_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="user_key_file is for hash_users"):
        parse_config(
            {"name": "x", "prepare": {"events": {"paths": ["a"], "time": "t"},
                                      "user_key_file": "k"}}, "test",
        )  # fmt: skip


def test_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, KEY)
    digest = key_digest(KEY.encode())
    assert key_of_dataset(digest, prepare(hash_users=False)) == KEY.encode()
    assert key_of_dataset("", prepare()) is None
    check_same_key(None, "")
    with pytest.raises(ConfigError, match="Received: another key"):
        key_of_dataset(key_digest(OTHER), prepare())
    with pytest.raises(ConfigError, match="Received: no key"):
        check_same_key(None, digest)
    with pytest.raises(ConfigError, match=r"not hashed. Received: a key. Unset prepare.hash_users"):
        check_same_key(OTHER, "")


def test_people_are_forgotten_by_the_ids_that_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = make_config(tmp_path, {"prepare": {"hash_users": True}})
    path = config.dataset_directory / MANIFEST
    manifest = read_manifest(config.dataset_directory)
    digest = {"user_key_digest": key_digest(KEY.encode())}
    path.write_text(manifest.model_copy(update=digest).model_dump_json())
    monkeypatch.setenv(ENVIRONMENT, OTHER.decode())
    with pytest.raises(ConfigError, match="Received: another key"):
        forget.run(config, frozenset({"7"}))
    monkeypatch.setenv(ENVIRONMENT, KEY)
    # whoever has the raw id 7 would be u5 here
    name = "distrec.forget.steps.hashed"
    monkeypatch.setattr(name, lambda value, key: {("7", KEY.encode()): "u5"}[value, key])
    assert forget.run(config, frozenset({"7"}))["unknown"] == 0
    assert read_manifest(config.dataset_directory).splits["users"].num_rows == 59
    written = "".join(
        file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()
    )
    assert KEY not in written + dump_config(config) + caplog.text
