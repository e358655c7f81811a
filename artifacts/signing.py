"""Who made an artifact: an ed25519 signature of manifest.json, in a file beside it.

The manifest names the hash of every file, so its signature covers them all. Keys are PEM files as OpenSSL makes them:
`openssl genpkey -algorithm ed25519 -out key.pem` and `openssl pkey -in key.pem -pubout -out key.pub`.
"""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError, MissingDependencyError, TargetError
from .schema import dump_json, from_plain, parse_json

SIGNATURE_NAME = "manifest.sig"
MAX_SIGNATURE_BYTES = 4096
# an ed25519 key in PEM form has 120, an RSA key of 16384 bits 13,000
_MAX_KEY_BYTES = 1 << 16
_ALGORITHM = "ed25519"

# signs manifest.json's bytes: what then stands in manifest.sig
Signer = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Signature:
    """manifest.sig, as JSON: the public key and the signature of manifest.json's bytes (RFC 8032), in hexadecimal."""

    algorithm: str
    key: str
    signature: str


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingDependencyError("signatures need cryptography; pip install 'qwen2vl-tc[sign]'") from error
    return serialization, ed25519


def _read(path: "str | Path") -> bytes:
    """A key's file, links followed. Raises TargetError for what is no regular file, or too large for a key."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise TargetError(f"{path}: is no regular file, expected a key in PEM form")
            data = os.read(fd, _MAX_KEY_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise TargetError(
            f"{path}: cannot read the key: {error.strerror}; make one with `openssl genpkey -algorithm ed25519 -out "
            "key.pem`, and its public half with `openssl pkey -in key.pem -pubout -out key.pub`"
        ) from error
    if len(data) > _MAX_KEY_BYTES:
        raise TargetError(f"{path}: larger than {_MAX_KEY_BYTES} bytes, expected a key in PEM form")
    return data


def signer(key_file: "str | Path") -> Signer:
    """What signs with the private key in a PEM file. Raises TargetError for any other file, MissingDependencyError."""
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(_read(key_file), password=None)
    except (ValueError, TypeError) as error:  # TypeError: the key wants a password
        raise TargetError(f"{key_file}: not a private key in PEM form without a password: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise TargetError(f"{key_file}: is no ed25519 key; make one with `openssl genpkey -algorithm ed25519`")
    public = key.public_key().public_bytes_raw().hex()
    return lambda data: dump_json(Signature(_ALGORITHM, public, key.sign(data).hex()))


def public_keys(keys: "Sequence[str | Path]") -> dict[str, str]:
    """The keys in PEM files of public keys, in hexadecimal, with their files. Raises TargetError for any other file."""
    if isinstance(keys, str | Path):
        raise TargetError(f"trusted_keys is {str(keys)!r}, expected a list of files")
    serialization, ed25519 = _library()
    files = {}
    for path in keys:
        try:
            key = serialization.load_pem_public_key(_read(path))
        except ValueError as error:
            raise TargetError(
                f"{path}: not a public key in PEM form; make it with `openssl pkey -in key.pem -pubout -out key.pub`"
            ) from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise TargetError(f"{path}: is no ed25519 key")
        files[key.public_bytes_raw().hex()] = str(path)
    return files


def _parse(signature: bytes, where: str) -> tuple[str, bytes]:
    """The public key in hexadecimal, and what it made of the manifest."""
    name = f"{where}/{SIGNATURE_NAME}"
    parsed = from_plain(Signature, parse_json(signature, name), name)
    if parsed.algorithm != _ALGORITHM:
        raise ArtifactError(f"{name}: algorithm {parsed.algorithm[:40]!r}, expected {_ALGORITHM!r}")
    try:
        key, value = bytes.fromhex(parsed.key), bytes.fromhex(parsed.signature)
    except ValueError as error:
        raise ArtifactError(f"{name}: key and signature must be hexadecimal") from error
    if (key.hex(), len(key), len(value)) != (parsed.key, 32, 64):
        raise ArtifactError(f"{name}: key and signature must be 64 and 128 hexadecimal digits, in lower case")
    return parsed.key, value


def _verify(manifest: bytes, key: str, value: bytes, where: str) -> None:
    _, ed25519 = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(value, manifest)
    except InvalidSignature as error:
        raise ArtifactError(
            f"{where}: manifest.json was altered after it was signed with the key {key[:16]}...: copy it again"
        ) from error


def check_signature(manifest: bytes, signature: bytes | None, trusted: Mapping[str, str], where: str) -> None:
    """Raises ArtifactError naming `where` unless one of the trusted keys signed these bytes of manifest.json."""
    if signature is None:
        raise ArtifactError(f"{where}: is not signed, and only signed artifacts are trusted here")
    key, value = _parse(signature, where)
    if key not in trusted:
        raise ArtifactError(
            f"{where}: is signed with the key {key[:16]}..., which is none of the {len(trusted)} trusted ones"
        )
    _verify(manifest, key, value, where)


@dataclass(frozen=True)
class Signed:
    """What there is to say of a signature.

    key: the public key that it names, in hexadecimal. valid: whether it is this key's, of this manifest; None where
    that cannot be checked. trusted: whether the key is among the trusted ones, by the file trusted_key; None where none
    were given. problem: why it is not valid, or was not checked.
    """

    key: str | None
    valid: bool | None
    trusted: bool | None
    trusted_key: str | None
    problem: str | None


def describe_signature(manifest: bytes, signature: bytes, trusted: Mapping[str, str] | None, where: str) -> Signed:
    """Who signed these bytes of manifest.json, and whether that holds."""
    key: str | None = None
    valid: bool | None = True
    problem: str | None = None
    try:
        key, value = _parse(signature, where)
        _verify(manifest, key, value, where)
    except ArtifactError as error:
        valid, problem = False, str(error)
    except MissingDependencyError as error:
        valid, problem = None, str(error)
    file = trusted.get(key) if trusted and key else None
    return Signed(key, valid, None if trusted is None else bool(valid and file), file, problem)
