"""The config object: golden bytes, keys that fit and do not, and nothing that can be weakened or made expensive."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vmferry.store import config as config_module
from vmferry.store.config import Key, KeyFile, PassPhrase, new_config, read_config
from vmferry.store.errors import Damaged, WrongKey
from vmferry.store.seal import OpenSeal, SecretSeal


def config(key: Key | None = None) -> bytes:
    return new_config(
        repository=bytes(range(16)), created_s=1.5, frame_pages=8, key=key, master=b"m" * 32, salt=b"s" * 16
    )


GOLDEN = b"""{
 "format": "vmferry-repository",
 "version": 1,
 "repository": "000102030405060708090a0b0c0d0e0f",
 "created_s": 1.5,
 "chunker": "pages-4096",
 "hash": "sha256-128",
 "compression": "zstd",
 "frame_pages": 8,
 "encryption": null,
 "proof": "PROOF",
 "frame_check": "sha256-128"
}"""
OLDER = GOLDEN.replace(b"PROOF", b"5760b7b053ef5a9c458b0db05cd97cf5962a99f90e566d4a3cc5f4d51831fc12").replace(
    b',\n "frame_check": "sha256-128"', b""
)
"""As it was written before frames had checks."""


def test_golden_bytes_of_version_1() -> None:
    data = config()
    proof = json.loads(data)["proof"]
    assert proof == "6bf174e6ed5180164ac71084c52030b4d39e2f8592b8c251e51cbc92d54e7f0b"
    assert data == GOLDEN.replace(b"PROOF", proof.encode())


def test_a_config_from_before_frames_had_checks() -> None:
    found, secrets = read_config(OLDER, None)
    assert found.frame_check is None
    assert not secrets.seal.proves_frames
    with pytest.raises(Damaged, match="proof"):
        read_config(changed(OLDER, frame_check="sha256-128"), None)
    assert b"frame_check" not in config(KeyFile(bytes(32))), "there each frame is sealed anyway"


def changed(data: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(data) | fields).encode()


@pytest.mark.parametrize("key", [PassPhrase("häslich"), KeyFile(bytes(32))])
def test_the_key_opens_the_same_secrets_every_time(key: Key) -> None:
    data = config(key)
    assert b"m" * 32 not in data
    _, secrets = read_config(data, key)
    _, again = read_config(data, key)
    assert isinstance(secrets.seal, SecretSeal)
    assert secrets.id_key == again.id_key
    assert again.seal.open("a", 0, secrets.seal.close("a", 0, b"x")) == b"x"


def test_without_encryption() -> None:
    found, secrets = read_config(config(), None)
    assert isinstance(secrets.seal, OpenSeal)
    assert (found.frame_pages, found.encryption) == (8, None)
    with pytest.raises(WrongKey, match="not encrypted"):
        read_config(config(), PassPhrase("x"))


@pytest.mark.parametrize(
    ("made", "tried"),
    [
        (PassPhrase("a"), None), (PassPhrase("a"), PassPhrase("b")), (PassPhrase("a"), KeyFile(bytes(32))),
        (KeyFile(bytes(32)), KeyFile(b"x" * 32)), (KeyFile(bytes(32)), PassPhrase("a")),
        (KeyFile(bytes(32)), KeyFile(b"short")),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit(made: Key, tried: Key | None) -> None:
    with pytest.raises(WrongKey):
        read_config(config(made), tried)


@pytest.mark.parametrize(
    "fields",
    [
        {"frame_pages": 16}, {"repository": "ff" * 16}, {"created_s": 2.0}, {"proof": "00" * 32}, {"version": 2},
        {"format": "other"}, {"chunker": "fastcdc"}, {"frame_pages": 0}, {"frame_pages": 65}, {"proof": "zz"},
        {"repository": "00"}, {"more": 1}, {"frame_check": None}, {"frame_check": "crc32"},
        {"frame_pages": "8"}, {"hash": "md5"},
    ],
)  # fmt: skip
def test_a_changed_config_is_damaged(fields: dict[str, Any]) -> None:
    with pytest.raises(Damaged, match="config"):
        read_config(changed(config(), **fields), None)


def test_text_that_is_no_config() -> None:
    for data in (b"", b"{}", b"[1]", b"\xff", b"[" * 5000):
        with pytest.raises(Damaged):
            read_config(data, None)


def test_encryption_cannot_be_turned_off_or_weakened() -> None:
    key = PassPhrase("x")
    data = config(key)
    with pytest.raises(Damaged):
        read_config(changed(data, encryption=None), None)
    with pytest.raises(WrongKey):
        read_config(changed(data, frame_pages=16), key)
    shown = json.loads(data)["encryption"]
    for numbers in ({"cost": 2}, {"block": 1}):
        with pytest.raises(WrongKey):
            read_config(changed(data, encryption=shown | numbers), key)


@pytest.mark.parametrize(
    "numbers", [{"cost": 1 << 24}, {"cost": 1 << 40}, {"cost": 3}, {"cost": 0}, {"block": 0}, {"block": 65},
                {"cost": 1 << 20, "block": 8}, {"salt": "00"}],
)  # fmt: skip
def test_what_a_config_may_ask_for_is_bounded(numbers: dict[str, Any]) -> None:
    data = config(PassPhrase("x"))
    with pytest.raises(Damaged):
        read_config(changed(data, encryption=json.loads(data)["encryption"] | numbers), PassPhrase("x"))


def test_a_master_key_of_another_length_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    key = KeyFile(bytes(32))
    data = config(key)
    monkeypatch.setattr(config_module, "KEY_BYTES", 16)
    with pytest.raises(Damaged, match="master key"):
        read_config(data, key)
