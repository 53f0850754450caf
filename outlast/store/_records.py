"""Records: small JSON objects of a job; a few members are for everybody, the rest is sealed."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag

from outlast.errors import ConfigError, CorruptCheckpoint
from outlast.model import JobKey
from outlast.store._keys import SALT, Keyring

# What a reader without the key can see: whose job it is and how it stands, nothing of what it does.
PUBLIC = ("uid", "node", "epoch", "interval", "time", "status", "store", "local")
_NONCE = bytes(12)  # a record has a key of its own, which encrypts once


def encode(job: JobKey, name: str, value: Mapping[str, Any], keyring: Keyring) -> bytes:
    """Return *value* as the record *name* of *job* is stored: a line of JSON."""
    salt = os.urandom(SALT)
    public = {key: value[key] for key in PUBLIC if key in value}
    rest = {key: value[key] for key in value if key not in PUBLIC}
    cipher = keyring.cipher(keyring.newest, salt, _purpose(job, name))
    data = cipher.encrypt(_NONCE, _json(rest), _json(public))
    sealed = {"key": keyring.newest, "salt": salt.hex(), "data": base64.b64encode(data).decode()}
    return _json({"public": public, "sealed": sealed}) + b"\n"


def decode(data: bytes, job: JobKey, name: str, keyring: Keyring | ConfigError) -> Mapping[str, Any]:
    """Return the value that `encode` was given; without a key only its public members, unproven.

    Raises:
        CorruptCheckpoint: it is not what was stored as the record *name* of *job*.
        KeyMissing: it is encrypted with a key that is not in *keyring*.
    """
    try:
        stored = json.loads(data)
        public = dict(stored["public"])
        if not isinstance(keyring, Keyring):
            return public
        sealed = stored["sealed"]
        cipher = keyring.cipher(str(sealed["key"]), bytes.fromhex(sealed["salt"]), _purpose(job, name))
        rest = json.loads(cipher.decrypt(_NONCE, base64.b64decode(sealed["data"]), _json(public)))
        return {**public, **rest}
    except (KeyError, TypeError, ValueError, RecursionError, InvalidTag) as error:
        raise CorruptCheckpoint(f"{job}: record {name}: not what was stored there: {error!r}") from error


def _purpose(job: JobKey, name: str) -> str:
    return f"outlast record 1\n{job}\n{name}"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), separators=(",", ":"), allow_nan=False).encode()
