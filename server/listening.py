"""Whether an address can be listened on, and in one sentence why not. Listens on nothing itself."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from server.errors import UwsError

_FIRST_FREE_TO_ALL = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that has the port (a free one for 0) and does not listen.

    `shared`: others have the port too (SO_REUSEPORT). Raises OSError.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    holder = socket.socket(family)
    try:
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as uSockets does
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
    except OSError:
        holder.close()
        raise
    return holder


def check(host: str, port: int) -> None:
    """Pass an address that this process could listen on now.

    Raises UwsError.
    """
    try:
        bound(host, port).close()
    except OSError as error:
        raise UwsError(why_not(error, host, port)) from error


def why_not(error: OSError, host: str, port: int, *, hosts: str = "HOST", ports: str = "PORT") -> str:
    """Why one cannot listen there; `hosts` and `ports` are the variables that say where."""
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"{hosts}: expected an address of this machine, got {host!r}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        first = _FIRST_FREE_TO_ALL.read_text().strip() if _FIRST_FREE_TO_ALL.exists() else "1024"
        right = f"those below {first} are for root, or take CAP_NET_BIND_SERVICE"
        return f"{ports}: expected a port that this user may listen on, got {port}: {right}"
    if error.errno == errno.EADDRINUSE:
        return f"{ports}: expected a free port at {hosts}={host}, got {port}: another process has it"
    return f"{hosts}, {ports}: expected an address to listen on, got {host!r} and {port}: {error.strerror}"
