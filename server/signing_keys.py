"""The public keys that RS and ES tokens are verified with: one from a setting, and those of a JWK set in a file.

The file is looked at while the server runs, so that an identity provider's new keys need no restart. Knows no token.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jwt
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from server.config import Settings
from server.errors import ConfigError

LOOK_EVERY_S: Final = 1.0
"""How often the file of the JWK set is read while tokens come in: it is small, and reading it takes 30 µs."""

MIN_RSA_BITS: Final = 2048
"""RFC 7518, section 3.3."""

_CURVES: Final = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}
"""RFC 7518, section 3.4."""

_ALGORITHMS: Final[dict[str, Any]] = {"RSA": jwt.algorithms.RSAAlgorithm, "EC": jwt.algorithms.ECAlgorithm}
_BLOCK: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", re.DOTALL)
_LONGEST_FILE: Final = 1 << 20
_SETTINGS: Final = "JWT_PUBLIC_KEY, JWT_PUBLIC_KEY_FILE or JWT_JWKS_FILE"

_log = logging.getLogger(__name__)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


class SigningKey(NamedTuple):
    """A public key and what its owner says it is for; `limits` are members of its JWK (RFC 7517, section 4)."""

    key: PublicKey
    kid: str | None = None
    limits: Mapping[str, Any] = MappingProxyType({})

    def misfit(self, algorithm: str) -> str:
        """Why this key verifies no token of `algorithm`; empty if it does."""
        use, operations, meant_for = (self.limits.get(name) for name in ("use", "key_ops", "alg"))
        if use not in (None, "sig"):
            return f"its use is {use!r}, expected 'sig'"
        if operations is not None and (not isinstance(operations, list) or "verify" not in operations):
            return f"its key_ops are {operations!r}, expected 'verify' among them"
        if meant_for not in (None, algorithm):
            return f"its alg is {meant_for!r}"
        if isinstance(self.key, rsa.RSAPublicKey):
            if not algorithm.startswith("RS"):
                return "it is an RSA key"
            size = self.key.key_size
            return "" if size >= MIN_RSA_BITS else f"it has {size} bits, expected at least {MIN_RSA_BITS}"
        curve = self.key.curve.name
        return "" if _CURVES.get(algorithm) == curve else f"it is an EC key of the curve {curve}"


class SigningKeys:
    """The keys for each of the allowed algorithms."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError when a key cannot be read, or an allowed algorithm has none."""
        self._algorithms = [name for name in settings.jwt_algorithms if not name.startswith("HS")]
        self._file = Path(settings.jwt_jwks_file) if settings.jwt_jwks_file else None
        self._own: list[SigningKey] = []
        if settings.jwt_public_key:
            variable = "JWT_PUBLIC_KEY_FILE" if settings.jwt_public_key_file else "JWT_PUBLIC_KEY"
            try:
                self._own.append(SigningKey(read_public_key(settings.jwt_public_key)))
            except ValueError as error:
                got = f"{len(settings.jwt_public_key)} characters"
                raise ConfigError(f"{variable}: expected {error}, got {got}") from error
        self._content = b""
        self._complaint = ""
        self._looked_s = time.monotonic()
        published: list[SigningKey] = []
        if self._file:
            try:
                self._content = _read(self._file)
                published = read_jwks(self._content)
            except (OSError, ValueError) as error:
                said = _in_words(error)
                raise ConfigError(f"JWT_JWKS_FILE: expected a file with a JWK set (RFC 7517): {said}") from error
        try:
            self._by_algorithm = self._chosen(published)
        except ValueError as error:
            raise ConfigError(f"{_SETTINGS}: {error}") from error

    def candidates(self, algorithm: str, kid: str | None) -> list[PublicKey]:
        """The keys that may have signed such a token: those of its `kid`, or all where none is called so."""
        keys = self._by_algorithm[algorithm]
        return [each.key for each in keys if kid is not None and each.kid == kid] or [each.key for each in keys]

    def changed(self) -> bool:
        """Look at the file, once a second at most; whether there are other keys now.

        What cannot be used leaves the keys as they are, and is logged once.
        """
        now_s = time.monotonic()
        if self._file is None or now_s - self._looked_s < LOOK_EVERY_S:
            return False
        self._looked_s = now_s
        try:
            content = _read(self._file)
            if content == self._content:
                self._recovered()
                return False
            chosen = self._chosen(read_jwks(content))
        except (OSError, ValueError) as error:
            complaint = _in_words(error)
            if complaint != self._complaint:
                _log.warning("JWT_JWKS_FILE cannot be used now, the keys read before stay: %s", complaint)
            self._complaint = complaint
            return False
        self._recovered()
        self._content, self._by_algorithm = content, chosen
        _log.info("JWT_JWKS_FILE has changed: its keys are %s", ", ".join(self._names()) or "none")
        return True

    def _recovered(self) -> None:
        if self._complaint:
            self._complaint = ""
            _log.info("JWT_JWKS_FILE can be used again")

    def _names(self) -> list[str]:
        return sorted({repr(each.kid) for keys in self._by_algorithm.values() for each in keys if each.kid})

    def _chosen(self, published: list[SigningKey]) -> dict[str, list[SigningKey]]:
        """By algorithm, the keys that fit: a set may hold RSA and EC keys side by side, and keys to encrypt with.

        Raises ValueError if an algorithm has none.
        """
        keys = [*self._own, *published]
        chosen = {}
        for algorithm in self._algorithms:
            chosen[algorithm] = [each for each in keys if not each.misfit(algorithm)]
            if not chosen[algorithm]:
                why = f"none fits: {keys[0].misfit(algorithm)}" if keys else "got none"
                raise ValueError(f"expected a key for {algorithm}, {why}")
        return chosen


def read_public_key(text: str) -> PublicKey:
    """The key in any of the forms that it is handed on in: PEM or a certificate, also in one line, or base64 of either.

    Raises ValueError with what was expected.
    """
    expected = "an RSA or EC public key or its certificate, as PEM or base64"
    # In files of variables, line ends are often spelled out or have become blanks.
    text = re.sub(r"\\+r|\\+n", lambda end: "\n" if end[0][-1] == "n" else "", text).strip()
    try:
        if "-----BEGIN" not in text and not text.startswith(("ssh-", "ecdsa-")):
            content = base64.b64decode("".join(text.split()), validate=True)
            if b"-----BEGIN" in content:
                return read_public_key(content.decode())
            key = _read_der(content)
        elif text.startswith(("ssh-", "ecdsa-")):
            key = serialization.load_ssh_public_key(text.encode())
        else:
            key = _read_pem(text)
    except (binascii.Error, UnicodeError, UnsupportedAlgorithm):
        raise ValueError(expected) from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("a public key") else expected) from None
    if not isinstance(key, PublicKey):
        raise ValueError(expected)
    return key


def _read_pem(text: str) -> Any:
    blocks = _BLOCK.findall(text)
    if any("PRIVATE" in label for label, _ in blocks):
        raise ValueError("a public key, not a private one")
    if len([label for label, _ in blocks if label != "CERTIFICATE"]) > 1:
        raise ValueError("a public key, not several (JWT_JWKS_FILE takes several)")
    if not blocks:
        raise ValueError("PEM")
    label, body = blocks[0]  # behind a certificate stand those of its authorities, which sign no tokens
    content = "".join(body.split())
    base64.b64decode(content, validate=True)
    lines = "\n".join(content[begin : begin + 64] for begin in range(0, len(content), 64))
    whole = f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n".encode()
    if label == "CERTIFICATE":
        return x509.load_pem_x509_certificate(whole).public_key()
    return serialization.load_pem_public_key(whole)


def _read_der(content: bytes) -> Any:
    try:
        return serialization.load_der_public_key(content)
    except ValueError:
        return x509.load_der_x509_certificate(content).public_key()


def read_jwks(content: bytes) -> list[SigningKey]:
    """The RSA and EC keys of a JWK set (RFC 7517, section 5); those of other kinds, or damaged, are passed over.

    Raises ValueError when there is none, or a private one.
    """
    try:
        jwks = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    entries = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(entries, list):
        raise ValueError("expected an object with a list of `keys`")
    found, damage = [], "it has no keys"
    for entry in entries:
        kind = entry.get("kty") if isinstance(entry, dict) else None
        if kind not in ("RSA", "EC"):
            damage = "no key of it has the kty RSA or EC"
            continue
        if "d" in entry:
            raise ValueError("a key of it is private: that belongs to whoever signs tokens, and nowhere else")
        try:
            key = _ALGORITHMS[kind].from_jwk(entry)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, OverflowError, UnsupportedAlgorithm):
            damage = "no key of it can be read"
            continue
        kid = entry.get("kid")
        limits = {name: entry[name] for name in ("use", "key_ops", "alg") if entry.get(name) is not None}
        found.append(SigningKey(key, kid if isinstance(kid, str) else None, limits))
    if not found:
        raise ValueError(damage)
    return found


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_LONGEST_FILE + 1)
    if len(content) > _LONGEST_FILE:
        raise ValueError(f"expected at most {_LONGEST_FILE} bytes")
    return content


def _in_words(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
