"""What the text of a setting means, or ValueError with what was expected of it.

Pure: no function here opens a file, asks the network or knows a variable's name. `shown` is the one place that decides
how much of a wrong value may be repeated.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any, Final

import psycopg.conninfo
import psycopg.pq

from server.events import BOARD_NAME, CONTROL_CHARACTERS

MIN_SECRET_BYTES: Final = 32
"""HS256 takes keys of at least its hash's size (RFC 7518, section 3.2)."""

ALGORITHMS: Final = ("HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512")
DEAD_LETTER_SUFFIX: Final = ".dead-letter"
LOWEST_RATE: Final = 0.001
"""Updates a second. What is much less overflows the numbers that Redis keeps a limit in."""

_LONGEST_TOPIC: Final = 249 - len(DEAD_LETTER_SUFFIX)
_LONGEST_SHOWN: Final = 200
_INVISIBLE: Final = "\ufeff\u200b\u2060"
_QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d"
_NAME: Final = re.compile(r"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*\.?")
_ENDPOINT: Final = re.compile(r"(?P<host>[^\[\]:]+|\[[^\[\]]+\]):(?P<port>\d{1,5})")
_ORIGIN: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[^/\s:@?#\[\]]+|\[[^\[\]]+\])(:(?P<port>\d{1,5}))?", re.IGNORECASE
)
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# A URL with a password, the content of a file where its name belongs, and so on.
_MAY_HOLD_A_SECRET: Final = re.compile(r"pass\w*=|secret=|@|-----|\{|\n|(?<!http)(?<!https)://", re.IGNORECASE)
_NO_PORT: Final = re.compile(r":[^\d:\]]")

# What other programs put into variables of these names.
_BY_KUBERNETES: Final = re.compile(r"(tcp|udp|sctp)://[\d.:a-f\[\]]+")
_BY_CONDA: Final = re.compile(r"\w+-(conda|apple|w64)[_-][\w.-]+")


def shown(raw: str, *, secret: bool = False, beside_secret: bool = False) -> str:
    """A wrong value as a message may repeat it: not at all where a password may be in it.

    `beside_secret` is for settings that people write in one with a password, as in `user:password` or `:password@host`.
    """
    if _BY_KUBERNETES.fullmatch(raw) and not secret:
        return repr(raw)
    hidden = secret or len(raw) > _LONGEST_SHOWN or _MAY_HOLD_A_SECRET.search(raw)
    if hidden or (beside_secret and _NO_PORT.search(raw)):
        return f"{len(raw)} characters"
    return repr(raw)


def origin_of(raw: str) -> str:
    """Who sets a variable to such a value behind its owner's back, and what to do about it; often nobody."""
    if _BY_KUBERNETES.fullmatch(raw):
        return " (Kubernetes sets it for a Service of that name: set `enableServiceLinks: false`, or the variable)"
    if _BY_CONDA.fullmatch(raw):
        return " (conda's compilers set it: unset it, or set it to 127.0.0.1 or 0.0.0.0)"
    return ""


def around(raw: str, *, secret: bool = False) -> str:
    """What stands around a value and is hardly meant to be part of it; empty if nothing does.

    A secret may begin or end with a quote; in a pair of them it was quoted where nobody takes the quotes away.
    """
    for place, character in (("start", raw[:1]), ("end", raw[-1:])):
        if character in ("\n", "\r"):
            return f"line end at its {place}"
        if character.isspace():
            return f"blank at its {place}"
        if character and character in _INVISIBLE:
            return f"invisible character (such as a byte order mark) at its {place}"
        if character and character in _QUOTES and (not secret or (len(raw) > 1 and raw[0] == raw[-1])):
            return "quotes around it" if raw[0] == raw[-1] else f"quote at its {place}"
    return ""


def text(raw: str) -> str:
    """Any text without control characters."""
    if CONTROL_CHARACTERS.search(raw):
        raise ValueError("text without control characters")
    return raw


def public_key(raw: str) -> str:
    """A public key; which kind is seen when it is used (server/signing_keys.py)."""
    if "PRIVATE KEY" in raw:
        raise ValueError("a public key, not a private one: that belongs to whoever signs tokens, and nowhere else")
    return raw


def secret(raw: str) -> bytes:
    """A shared secret that is long enough."""
    if "-----BEGIN" in raw:
        raise ValueError("a shared secret, not a PEM key: everybody knows the public one (it goes into JWT_PUBLIC_KEY)")
    if len(raw.encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"at least {MIN_SECRET_BYTES} bytes")
    return text(raw).encode()


def integer(low: int, high: int) -> Callable[[str], int]:
    """Parses a number within these bounds."""

    def parse(raw: str) -> int:
        value = int(raw) if re.fullmatch(r"-?[0-9]{1,20}", raw) else low - 1
        if not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return parse


def rate(raw: str) -> float:
    """Updates a second; 0 is no limit."""
    try:
        value = float(raw)
    except ValueError:
        value = -1
    if value != 0 and not LOWEST_RATE <= value <= 1_000_000:
        raise ValueError(f"0 (off), or a number from {LOWEST_RATE:g} to 1000000")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """Parses one of these words."""

    def parse(raw: str) -> str:
        if raw not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return raw

    return parse


def words(raw: str) -> tuple[str, ...]:
    """What stands between commas, without the blanks around it."""
    return tuple(word.strip() for word in raw.split(",") if word.strip())


def boards(raw: str) -> tuple[str, ...]:
    """Names of boards."""
    names = words(raw)
    if not names or not all(BOARD_NAME.fullmatch(name) for name in names):
        raise ValueError(f"names of {BOARD_NAME.pattern}, separated by commas")
    return names


def algorithms(raw: str) -> tuple[str, ...]:
    """Names of JWT's algorithms (RFC 7518, section 3.1)."""
    names = words(raw)
    if not names or not set(names) <= set(ALGORITHMS):
        raise ValueError("some of " + ", ".join(ALGORITHMS))
    return names


def origins(raw: str) -> tuple[str, ...]:
    """Origins exactly as browsers send them, for they are compared byte by byte; or `*`."""
    expected = "* or origins such as https://example.org, separated by commas"
    found = words(raw)
    for origin in found:
        if origin == "*":
            if len(found) > 1:
                raise ValueError(f"{expected}; * alone, for it allows every other one too")
            continue
        as_sent = _as_browsers_send(origin)
        if as_sent is None:
            raise ValueError(f"{expected}, without path, pattern or password")
        if as_sent != origin:
            raise ValueError(f"{expected}, as browsers send them: {as_sent}")
    return found


def _as_browsers_send(origin: str) -> str | None:
    """The serialization of an origin (RFC 6454, section 6.2); None for what is none."""
    matched = _ORIGIN.fullmatch(origin.removesuffix("/"))
    if matched is None:
        return None
    scheme, port = matched["scheme"].lower(), int(matched["port"] or 0)
    try:
        host = matched["host"].lower()
        host = f"[{ipaddress.IPv6Address(host[1:-1])}]" if host[0] == "[" else host.encode("idna").decode()
    except ValueError:
        return None
    if port > 65535 or not (host[0] == "[" or is_host(host)):
        return None
    return f"{scheme}://{host}" + (f":{port}" if port and port != _DEFAULT_PORTS[scheme] else "")


def networks(raw: str) -> tuple[str, ...]:
    """Addresses or networks."""
    expected = "addresses or networks such as 10.0.0.0/8, separated by commas"
    found = words(raw)
    try:
        parsed = [ipaddress.ip_network(network, strict=False) for network in found]
    except ValueError:
        raise ValueError(expected) from None
    if any(network.version == 6 and network.network_address.ipv4_mapped for network in parsed):
        raise ValueError(f"{expected}; those of IPv4 not within ::ffff:0:0/96")
    return found


def is_host(raw: str) -> bool:
    """Whether it is an address, or could be a name."""
    try:
        ipaddress.ip_address(raw)
    except ValueError:
        return len(raw) <= 253 and _NAME.fullmatch(raw) is not None and re.fullmatch(r"[\d.]+", raw) is None
    return True


def _is_endpoint(raw: str) -> bool:
    """Whether it is `host:port`, an IPv6 address being in brackets."""
    matched = _ENDPOINT.fullmatch(raw)
    return matched is not None and is_host(matched["host"].strip("[]")) and 1 <= int(matched["port"]) <= 65535


def own_host(raw: str) -> str:
    """Where to listen."""
    if not is_host(raw) or _BY_CONDA.fullmatch(raw):
        raise ValueError("an address of this machine such as 127.0.0.1, 0.0.0.0 or ::, or its name")
    return raw


def redis_hosts(raw: str) -> str:
    """Where Redis is, or some nodes of its cluster, each perhaps with a port of its own."""
    found = words(raw)
    if not found or not all(is_host(each) or is_host(each.strip("[]")) or _is_endpoint(each) for each in found):
        raise ValueError("a host name or address, without scheme, password and port (REDIS_PASSWORD, REDIS_PORT)")
    return raw


def brokers(raw: str) -> str:
    """Where Kafka is."""
    if not all(_is_endpoint(broker) for broker in words(raw) or ("",)):
        raise ValueError("host:port, separated by commas")
    return raw


def topic(raw: str) -> str:
    """A name that Kafka takes, also with the suffix of dead letters."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", raw) or len(raw) > _LONGEST_TOPIC or raw in (".", ".."):
        raise ValueError(f"1 to {_LONGEST_TOPIC} letters, digits, dots, _ or -")
    return raw


def database_url(raw: str) -> str:
    """What libpq takes for an address, and takes for the one that was meant.

    In a URL, an @ or / in a password ends it: the rest of the password would be looked up as a host, by name.
    """
    try:
        parts = psycopg.conninfo.conninfo_to_dict(raw)
    except psycopg.Error:
        parts = None
    if parts is None or not _is_meant(parts, is_url=raw.startswith(("postgresql://", "postgres://"))):
        raise ValueError(
            "a URL such as postgresql://user:password@host:5432/name, "
            "with @ in a password as %40, / as %2F, : as %3A and % as %25"
        )
    if parameter := _wrong_parameter(raw):
        raise ValueError(f"a value of {parameter} that libpq knows")
    return raw


def _wrong_parameter(conninfo: str) -> str | None:
    """The parameter, such as sslmode, whose value libpq refuses before it connects."""
    # A directory that is not there in place of the hosts: so nothing is connected to.
    nowhere = psycopg.conninfo.make_conninfo(conninfo, host="/nonexistent", hostaddr="", port="")
    connection = psycopg.pq.PGconn.connect_start(nowhere.encode())
    refused = re.match(r'invalid "?(\w+)"? value', connection.error_message.decode(errors="replace"))
    connection.finish()
    return refused[1] if refused else None


def _is_meant(parts: dict[str, Any], *, is_url: bool) -> bool:
    hosts, ports = str(parts.get("host", "")).split(","), str(parts.get("port", "")).split(",")
    name = str(parts.get("dbname", ""))
    # A path is a socket's directory, and so is a name after @, though only where it cannot be a password's end.
    names = [host for host in hosts if host and not host.startswith("/" if is_url else ("/", "@"))]
    return (
        all(is_host(host) for host in names)
        and all(not port or (port.isdecimal() and 1 <= int(port) <= 65535) for port in ports)
        and not (is_url and re.search("[@/]", name))
    )
