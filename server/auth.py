"""Who is calling, and what they may write.

Tokens are JWTs (RFC 7519) in an `Authorization: Bearer` header (RFC 6750). Verified ones are remembered, since
checking a signature costs more than everything else in a request; their expiry is looked at every time.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import jwt

from server.config import Settings
from server.errors import ConfigError, Problem

MAX_SUBJECT: Final = 128
CACHE_SIZE: Final = 65_536
"""Verified tokens to remember; the oldest goes first."""

MAX_TOKEN_BYTES: Final = 8192
"""Longest token that is looked at: as much as common proxies let a header be."""

WRITE_SCOPE: Final = "scores:write"
FAILING_ADDRESSES: Final = 10_000

# What PyJWT lets through of a hostile token: numbers that overflow, JSON nested too deep, keys of another kind.
_BROKEN = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)

# JSON may spell half a surrogate pair, which no encoding can write: Redis would never get to see that batch.
_NO_SUBJECT: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Caller(NamedTuple):
    """A verified token. `is_writer`: its scope lets it write every player. `expires_s` is Unix time."""

    subject: str
    is_writer: bool
    expires_s: float


def _unauthorized(why: str, *, given: bool = True) -> Problem:
    challenge = 'Bearer realm="scoreboard"'
    if given:
        challenge += f', error="invalid_token", error_description="{why}"'
    return Problem(401, why, headers=(("WWW-Authenticate", challenge),))


class Authenticator:
    """Turns Authorization headers into callers."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError when a key for one of the allowed algorithms is missing."""
        self._settings = settings
        self._secrets = [secret for secret in (settings.jwt_secret, settings.jwt_secret_previous) if secret]
        self._public_keys: dict[str, dict[str, Any]] = {}
        self._callers: dict[bytes, Caller] = {}
        public_keys = list(_public_keys(settings))
        for algorithm in settings.jwt_algorithms:
            if algorithm.startswith("HS"):
                self._check_secrets(algorithm)
            else:
                self._public_keys[algorithm] = _fitting(algorithm, public_keys)

    def caller(self, authorization: bytes) -> Caller:
        """Who sent this Authorization header.

        Raises Problem 401.
        """
        caller = self._callers.get(authorization)
        if caller is None:
            scheme, _, token = authorization.partition(b" ")
            caller = self._verify(scheme, token.strip())
            if authorization == b"Bearer " + token.strip():
                # Any other spelling is verified each time: blanks make thousands of headers out of one token.
                self._remember(authorization, caller)
        if caller.expires_s <= time.time():
            self._callers.pop(authorization, None)
            raise _unauthorized("the token has expired")
        return caller

    def may_write(self, caller: Caller, player: str) -> bool:
        """Whether `caller` may change the score of `player`."""
        return caller.subject == player or caller.is_writer or self._settings.write_policy == "any"

    def _check_secrets(self, algorithm: str) -> None:
        shortest, needed = min(map(len, self._secrets), default=0), int(algorithm[2:]) // 8
        if shortest < needed:
            # RFC 7518, section 3.2: a key of the hash's size or larger.
            raise ConfigError(f"JWT_SECRET: expected at least {needed} bytes for {algorithm}, got {shortest or 'none'}")

    def _remember(self, authorization: bytes, caller: Caller) -> None:
        if len(self._callers) >= CACHE_SIZE:
            del self._callers[next(iter(self._callers))]
        self._callers[authorization] = caller

    def _verify(self, scheme: bytes, token: bytes) -> Caller:
        if scheme.lower() != b"bearer" or not token:
            raise _unauthorized("expected an Authorization header with a Bearer token", given=False)
        if len(token) > MAX_TOKEN_BYTES:  # uWebSockets takes headers of 400 KB, when they arrive in one piece
            raise _unauthorized(f"expected a token of at most {MAX_TOKEN_BYTES} bytes")
        try:
            return self._claims_to_caller(self._claims(token))
        except _BROKEN as error:
            raise _unauthorized(_reason(error)) from error

    def _claims(self, token: bytes) -> dict[str, Any]:
        settings = self._settings
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if algorithm not in settings.jwt_algorithms:
            raise jwt.InvalidAlgorithmError("the token's algorithm is not allowed")
        failure: Exception = jwt.InvalidKeyError("no key fits the token")
        for key in self._candidate_keys(algorithm, header.get("kid")):
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    audience=settings.jwt_audience or None,
                    issuer=settings.jwt_issuer or None,
                    leeway=settings.jwt_leeway_s,
                    options={"require": ["exp", "sub"], "verify_aud": bool(settings.jwt_audience)},
                )
            except jwt.InvalidSignatureError as error:
                failure = error
        raise failure

    def _candidate_keys(self, algorithm: str, kid: str | None) -> list[Any]:
        """Secrets never meet RS or ES tokens, nor public keys HS tokens: no key can be taken for another kind."""
        if algorithm.startswith("HS"):
            return list(self._secrets)
        keys = self._public_keys[algorithm]
        if kid is not None and kid in keys:
            return [keys[kid]]
        return list(keys.values())

    def _claims_to_caller(self, claims: dict[str, Any]) -> Caller:
        subject, expires_s, scope = claims["sub"], claims["exp"], claims.get("scope", "")
        if not 1 <= len(subject) <= MAX_SUBJECT or _NO_SUBJECT.search(subject):
            raise ValueError(f"expected a sub of 1 to {MAX_SUBJECT} characters, none of them control characters")
        if not isinstance(expires_s, int | float) or not math.isfinite(expires_s):
            raise ValueError("expected an exp in seconds")
        scopes = scope.split() if isinstance(scope, str) else scope
        if not isinstance(scopes, list):
            raise ValueError("expected a scope that is text or a list")
        return Caller(subject, WRITE_SCOPE in scopes, float(expires_s))


def _reason(error: BaseException) -> str:
    """Why a token was refused, fit for a quoted string in a header."""
    # The leeway is for nbf and iat alone, so PyJWT's own verdict on exp comes late but says the same.
    known = str(error) if isinstance(error, jwt.PyJWTError | ValueError) and len(str(error)) < 200 else ""
    return re.sub(r"[^\x20-\x7e]|[\"\\]", "", known) or "the token cannot be read"


def _public_keys(settings: Settings) -> Iterator[tuple[str, Any]]:
    if settings.jwt_public_key:
        yield "", settings.jwt_public_key
    if settings.jwt_jwks_file:
        try:
            jwks = json.loads(Path(settings.jwt_jwks_file).read_text())
            if not isinstance(jwks, dict):
                raise ValueError("not a JSON object")
            keys = jwt.PyJWKSet.from_dict(jwks).keys
        except (OSError, ValueError, jwt.PyJWTError) as error:
            raise ConfigError(f"JWT_JWKS_FILE: expected a file with a JWK set (RFC 7517): {error}") from error
        for number, jwk in enumerate(keys):
            yield jwk.key_id or f"#{number}", jwk.key


def _fitting(algorithm: str, keys: list[tuple[str, Any]]) -> dict[str, Any]:
    """Those of the keys that `algorithm` can use, by their `kid`: a set may hold RSA and EC keys side by side.

    Raises ConfigError if there are none.
    """
    fitting = {}
    why = "got none"
    for kid, key in keys:
        try:
            fitting[kid] = jwt.get_algorithm_by_name(algorithm).prepare_key(key)
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            why = f"none fits: {error}"
    if not fitting:
        raise ConfigError(f"JWT_PUBLIC_KEY or JWT_JWKS_FILE: expected a key for {algorithm}, {why}")
    return fitting


def issue(secret: bytes, subject: str, *, algorithm: str = "HS256", ttl_s: int = 3600, scope: str = "") -> str:
    """A token as the server accepts it, for tools and tests."""
    now_s = int(time.time())
    claims: dict[str, Any] = {"sub": subject, "iat": now_s, "exp": now_s + ttl_s}
    if scope:
        claims["scope"] = scope
    return jwt.encode(claims, secret, algorithm=algorithm)


class ClientAddress:
    """The address a limit should count, seen through the proxies one trusts."""

    def __init__(self, trusted_proxies: tuple[str, ...]) -> None:
        self._trusted = [ipaddress.ip_network(proxy, strict=False) for proxy in trusted_proxies]

    @property
    def needs_header(self) -> bool:
        """Whether X-Forwarded-For matters at all."""
        return bool(self._trusted)

    def of(self, peer: str, forwarded_for: str = "") -> str:
        """The last address in the chain that is not a trusted proxy; of IPv6 the /64 that one customer gets.

        A hop that is no address ends the chain, for whoever wrote what stands before it cannot be told.
        """
        address = _address(peer)
        for hop in reversed(forwarded_for.split(",")):
            previous = _address(hop.strip())
            if previous is None or address is None or not any(address in network for network in self._trusted):
                break
            address = previous
        if address is None:
            return peer
        if address.version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class FailureLimit:
    """Counts bad tokens by address, so that guessing costs the guesser more than us (GCRA, in process)."""

    def __init__(self, per_minute: int) -> None:
        self._interval_s = 60 / per_minute if per_minute else 0.0
        self._window_s = self._interval_s * per_minute
        self._arrivals_s: dict[str, float] = {}

    def failed(self, address: str, now_s: float) -> float:
        """Count one failure; how many seconds to stay away, 0 while below the limit."""
        arrival_s = max(self._arrivals_s.pop(address, now_s), now_s) + self._interval_s
        if arrival_s - now_s > self._window_s:
            self._arrivals_s[address] = arrival_s - self._interval_s
            return arrival_s - now_s - self._window_s
        while len(self._arrivals_s) >= FAILING_ADDRESSES:
            del self._arrivals_s[next(iter(self._arrivals_s))]
        self._arrivals_s[address] = arrival_s
        return 0.0
