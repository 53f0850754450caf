"""The keys that checkpoints are encrypted with, and what is derived from them (docs/store-format.md)."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from outlast.errors import ConfigError

_LINE = re.compile(r"(?P<id>[0-9a-f]{8}) (?P<key>[0-9a-f]{64})")
SALT = 16  # bytes


class KeyMissing(ConfigError):
    """Something is encrypted with a key that this node does not have: foreign, or older than those kept."""


@dataclass(frozen=True)
class Keyring:
    """Data keys by their ids; the first of the file, *newest*, encrypts, all of them decrypt."""

    newest: str
    keys: dict[str, bytes]

    def cipher(self, key_id: str, salt: bytes, purpose: str) -> AESGCM:
        """Return AES-256-GCM under a key of its own for *purpose*, derived by HKDF-SHA256 (RFC 5869).

        Raises:
            KeyMissing: there is no such key here.
        """
        try:
            key = self.keys[key_id]
        except KeyError:
            raise KeyMissing(
                f"{purpose.splitlines()[1]}: encrypted with key {key_id}, which this node does not have",
                hint="copy the key file of the node that wrote it, old keys included",
            ) from None
        return AESGCM(HKDF(SHA256(), 32, salt, purpose.encode()).derive(key))


def read_keyring(path: Path) -> Keyring:
    """Read the key file *path*: a line for each key, its id and 64 hexadecimal digits, the newest first.

    Raises:
        ConfigError: it cannot be read, others than its owner may read it, or it is no key file.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such key file", hint="make it with 'outlast store init'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if mode & 0o077:
        raise ConfigError(f"{path}: others than its owner may read it", hint=f"chmod 600 {path}")
    keys = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(
                f"{path}: line {number}: no key", hint="a line is a key's id and 64 hexadecimal digits"
            )
        keys[match["id"]] = bytes.fromhex(match["key"])
    if not keys:
        raise ConfigError(f"{path}: holds no key", hint="make one with 'outlast store init'")
    return Keyring(next(iter(keys)), keys)


def add_key(path: Path) -> str:
    """Put a fresh key in front of those in the key file *path*, which is made if need be; return its id.

    Older keys stay, to read what they encrypted. The file is replaced whole, and readable by its owner only.
    """
    old = path.read_text() if path.exists() else ""
    key_id = secrets.token_hex(4)
    part = path.with_name(path.name + ".new")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
        file.write(f"{key_id} {secrets.token_hex(32)}\n{old}")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return key_id
