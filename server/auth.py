"""Who is calling, and what they may write.

Tokens are JWTs (RFC 7519) in an `Authorization: Bearer` header (RFC 6750). Verified ones are remembered, since
checking a signature costs more than everything else in a request; their expiry is looked at every time.
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from typing import Any, Final, NamedTuple

import jwt

from server.config import Settings
from server.errors import ConfigError, Problem
from server.signing_keys import SigningKeys

MAX_SUBJECT: Final = 128
CACHE_SIZE: Final = 65_536
"""Verified tokens to remember; the oldest goes first."""

MAX_TOKEN_BYTES: Final = 8192
"""Longest token that is looked at: as much as common proxies let a header be."""

MAX_TTL_S: Final = 100 * 365 * 24 * 3600
"""Longest life of a token that is issued here."""

WRITE_SCOPE: Final = "scores:write"
FAILING_ADDRESSES: Final = 10_000

# What PyJWT lets through of a hostile token: numbers that overflow, JSON nested too deep, keys of another kind.
_BROKEN = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)

_WITH_PORT: Final = re.compile(r"([\d.]+):\d{1,5}|\[([^\[\]]*)\](?::\d{1,5})?")

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
        self._callers: dict[bytes, Caller] = {}
        for algorithm in settings.jwt_algorithms:
            if algorithm.startswith("HS"):
                check_secrets(settings, algorithm)
        self._keys = SigningKeys(settings)
        self._watches_keys = bool(settings.jwt_jwks_file)

    def caller(self, authorization: bytes) -> Caller:
        """Who sent this Authorization header.

        Raises Problem 401.
        """
        if self._watches_keys and self._keys.changed():
            self._callers.clear()  # some may have been let in by a key that is gone
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
                return _TOKENS.decode(
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
        return self._keys.candidates(algorithm, kid)

    def _claims_to_caller(self, claims: dict[str, Any]) -> Caller:
        subject, expires_s = claims["sub"], claims["exp"]
        _check_subject(subject)
        if not isinstance(expires_s, int | float) or not math.isfinite(expires_s):
            raise ValueError("expected an exp in seconds")
        # RFC 8693 calls it scope, some identity providers scp.
        is_writer = any(WRITE_SCOPE in _scopes(name, claims.get(name, "")) for name in ("scope", "scp"))
        return Caller(subject, is_writer, float(expires_s))


class _Tokens(jwt.PyJWT):
    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        """PyJWT: the claims. One that is null is none: identity providers send all that they have fields for."""
        return {name: value for name, value in super()._decode_payload(decoded).items() if value is not None}


_TOKENS: Final = _Tokens()


def _scopes(name: str, claim: Any) -> list[Any]:
    scopes = claim.split() if isinstance(claim, str) else claim
    if not isinstance(scopes, list):
        raise ValueError(f"expected a {name} that is text or a list")
    return scopes


def check_secrets(settings: Settings, algorithm: str) -> None:
    """Whether the secrets are long enough for an HS algorithm (RFC 7518, section 3.2: the hash's size or larger).

    Raises ConfigError.
    """
    needed = int(algorithm[2:]) // 8
    for variable, secret in (
        ("JWT_SECRET", settings.jwt_secret or b""),
        ("JWT_SECRET_PREVIOUS", settings.jwt_secret_previous),
    ):
        if secret is not None and len(secret) < needed:
            raise ConfigError(
                f"{variable}: expected at least {needed} bytes for {algorithm}, got {len(secret) or 'none'}"
            )


def _reason(error: BaseException) -> str:
    """Why a token was refused, fit for a quoted string in a header."""
    # The leeway is for nbf and iat alone, so PyJWT's own verdict on exp comes late but says the same.
    known = str(error) if isinstance(error, jwt.PyJWTError | ValueError) and len(str(error)) < 200 else ""
    return re.sub(r"[^\x20-\x7e]|[\"\\]", "", known) or "the token cannot be read"


def signing_algorithm(settings: Settings) -> str:
    """The algorithm to sign with; empty when the server takes none that a shared secret can sign."""
    return next((name for name in settings.jwt_algorithms if name.startswith("HS")), "")


def token_for(settings: Settings, subject: str, *, ttl_s: int, scope: str = "") -> str:
    """A token that a server with these settings accepts.

    Raises ConfigError when there is no secret to sign it with, and ValueError for what the server would not take.
    """
    algorithm = signing_algorithm(settings)
    if not algorithm:
        allowed = ",".join(settings.jwt_algorithms)
        raise ConfigError(
            f"JWT_ALGORITHMS: expected HS256, HS384 or HS512 to sign a token, got {allowed}: only public keys are "
            "known here, so take tokens from whoever has the private key"
        )
    check_secrets(settings, algorithm)
    _check_subject(subject)
    secret = settings.jwt_secret or b""
    audience, issuer = settings.jwt_audience, settings.jwt_issuer
    token = issue(secret, subject, algorithm=algorithm, ttl_s=ttl_s, scope=scope, audience=audience, issuer=issuer)
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(
            f"expected a token of at most {MAX_TOKEN_BYTES} bytes, got {len(token)}: its scope is too long"
        )
    return token


def issue(
    secret: bytes,
    subject: str,
    *,
    algorithm: str = "HS256",
    ttl_s: int = 3600,
    scope: str = "",
    audience: str = "",
    issuer: str = "",
) -> str:
    """A signed token, for tools and tests; nothing of it is checked."""
    now_s = int(time.time())
    claims: dict[str, Any] = {"sub": subject, "iat": now_s, "exp": now_s + ttl_s}
    claims |= {name: value for name, value in (("scope", scope), ("aud", audience), ("iss", issuer)) if value}
    return jwt.encode(claims, secret, algorithm=algorithm)


def _check_subject(subject: str) -> None:
    if not 1 <= len(subject) <= MAX_SUBJECT or _NO_SUBJECT.search(subject):
        raise ValueError(f"expected a sub of 1 to {MAX_SUBJECT} characters, none of them control characters")


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
            if not hop.strip():
                continue  # an empty member of a list means nothing (RFC 9110, section 5.6.1.2)
            previous = _address(_without_port(hop.strip()))
            if previous is None or address is None or not any(address in network for network in self._trusted):
                break
            address = previous
        if address is None:
            return peer
        if address.version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address)


def _without_port(hop: str) -> str:
    """`1.2.3.4:5678`, `[2001:db8::1]:5678` and `[2001:db8::1]` as gateways write them, without port and brackets."""
    matched = _WITH_PORT.fullmatch(hop)
    return matched[1] or matched[2] if matched else hop


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
