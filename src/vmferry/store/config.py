"""The config object: what kind of repository this is, and how its key is found. Written once, never changed.

Theory of operation
-------------------
One JSON object in clear text, so that a person and an older vmferry can read what they have. `chunker`, `hash` and
`compression` say how pages are cut, known and packed; a version that knows other ones gives them other words, and this
one refuses those. Every field is protected by `proof`: without encryption a SHA-256 of the rest; with it the sealed
master key, to which the rest is bound, so nobody can turn encryption off or weaken what is asked of the pass phrase.

Rule 1: what a hostile config asks for is bounded before it is done (`STORE_SCRYPT_BYTES_MAX`).
Rule 2: the master key is random and never stored in clear; a pass phrase or key file only opens it.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vmferry.limits import STORE_FRAME_PAGES_MAX, STORE_SCRYPT_BYTES_MAX
from vmferry.store.errors import Damaged, WrongKey
from vmferry.store.seal import OpenSeal, Seal, SecretSeal, derived

NAME: Final = "config"
FORMAT: Final = "vmferry-repository"
VERSION: Final = 1
CHUNKER: Final = "pages-4096"
HASH: Final = "sha256-128"
COMPRESSION: Final = "zstd"
FRAME_CHECK: Final = "sha256-128"
KEY_BYTES: Final = 32
_SALT_BYTES: Final = 16
_SCRYPT_COST: Final = 1 << 15
"""32 MiB and 0.1 s, once per opening: 2017's advice for interactive use, doubled."""


@dataclass(frozen=True, slots=True)
class PassPhrase:
    """What a person types."""

    text: str


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The content of a file with at least 32 random bytes."""

    content: bytes


Key = PassPhrase | KeyFile


class Encryption(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the master key is opened."""

    cipher: Literal["aes-256-gcm"]
    kdf: Literal["scrypt", "key-file"]
    salt: str
    cost: int = 0
    block: int = 0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """See the module's text. Hexadecimal where it is bytes. What came later has a default, which is not written."""

    format: Literal["vmferry-repository"]
    version: Literal[1]
    repository: str
    created_s: float
    chunker: Literal["pages-4096"]
    hash: Literal["sha256-128"]
    compression: Literal["zstd"]
    frame_pages: int
    encryption: Encryption | None
    proof: str
    frame_check: Literal["sha256-128"] | None = None
    """What frames of pages carry in a repository without encryption; None: nothing (before 2026-11-26)."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What follows from an opened config: how objects are sealed and how pages are known."""

    seal: Seal
    id_key: bytes


def new_config(
    *, repository: bytes, created_s: float, frame_pages: int, key: Key | None, master: bytes, salt: bytes
) -> bytes:
    """The config object of a new repository. `repository`, `master` and `salt` are the caller's random bytes."""
    assert len(repository) == 16
    assert len(master) == KEY_BYTES
    assert len(salt) == _SALT_BYTES
    assert 1 <= frame_pages <= STORE_FRAME_PAGES_MAX
    encryption = None
    if isinstance(key, PassPhrase):
        encryption = Encryption("aes-256-gcm", "scrypt", salt.hex(), _SCRYPT_COST, 8)
    elif isinstance(key, KeyFile):
        encryption = Encryption("aes-256-gcm", "key-file", salt.hex())
    config = Config(
        FORMAT, VERSION, repository.hex(), created_s, CHUNKER, HASH, COMPRESSION, frame_pages, encryption, "",
        FRAME_CHECK if encryption is None else None,
    )  # fmt: skip
    if encryption is None or key is None:
        proof = hashlib.sha256(_rest(config)).digest()
    else:
        # The key that this nonce of zeros is used with comes from a salt of its own and seals nothing else.
        proof = AESGCM(_opener(encryption, key)).encrypt(bytes(12), master, _rest(config))
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(config, proof=proof.hex())), indent=1)


def read_config(data: bytes, key: Key | None) -> tuple[Config, Secrets]:
    """What a config object says. Raises Damaged; WrongKey when the key does not fit."""
    try:
        config = msgspec.json.decode(data, type=Config)
        proof, repository = bytes.fromhex(config.proof), bytes.fromhex(config.repository)
        salt = b"" if config.encryption is None else bytes.fromhex(config.encryption.salt)
    except (msgspec.DecodeError, ValueError) as error:
        raise Damaged(NAME, f"it is no config that this version knows: {error}") from None
    if not 1 <= config.frame_pages <= STORE_FRAME_PAGES_MAX or len(repository) != 16:
        raise Damaged(NAME, "its numbers are out of bounds")
    if config.encryption is None:
        if not hmac.compare_digest(proof, hashlib.sha256(_rest(config)).digest()):
            raise Damaged(NAME, "it does not fit its proof")
        if key is not None:
            raise WrongKey("the repository is not encrypted, and a key was given: is it the right one?")
        seal = OpenSeal(repository, frames=config.frame_check is not None)
        return config, Secrets(seal, derived(repository, b"vmferry: ids of pages"))
    if key is None:
        raise WrongKey("the repository is encrypted: its key file or pass phrase is needed")
    if len(salt) != _SALT_BYTES:
        raise Damaged(NAME, "its salt has another length")
    try:
        master = AESGCM(_opener(config.encryption, key)).decrypt(bytes(12), proof, _rest(config))
    except (InvalidTag, ValueError):
        raise WrongKey("this key does not open the repository (or its config was changed)") from None
    if len(master) != KEY_BYTES:
        raise Damaged(NAME, "its master key has another length")
    return config, Secrets(SecretSeal(master), derived(master, b"vmferry: ids of pages"))


def _opener(encryption: Encryption, key: Key) -> bytes:
    """The key that opens the master key."""
    salt = bytes.fromhex(encryption.salt)
    if isinstance(key, PassPhrase):
        if encryption.kdf != "scrypt":
            raise WrongKey("the repository opens with a key file, not with a pass phrase")
        cost, block = encryption.cost, encryption.block
        if not (1 < cost <= 1 << 24 and 0 < block <= 64 and cost & (cost - 1) == 0):
            raise Damaged(NAME, "its numbers for scrypt are out of bounds")
        if 128 * cost * block > STORE_SCRYPT_BYTES_MAX:
            raise Damaged(NAME, "it asks for more memory than a pass phrase is worth")
        return Scrypt(salt=salt, length=KEY_BYTES, n=cost, r=block, p=1).derive(key.text.encode())
    if encryption.kdf != "key-file":
        raise WrongKey("the repository opens with a pass phrase, not with a key file")
    if len(key.content) < KEY_BYTES:
        raise WrongKey(f"a key file has at least {KEY_BYTES} bytes; this one has {len(key.content)}")
    return derived(salt, key.content)


def _rest(config: Config) -> bytes:
    """Everything but the proof, in one spelling."""
    return msgspec.json.encode(msgspec.structs.replace(config, proof=""), order="deterministic")
