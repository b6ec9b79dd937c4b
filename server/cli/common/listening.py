"""Where a server listens, and how many connections fit the files that it may open. Accepts and opens nothing itself."""

from __future__ import annotations

import errno
import resource
import socket
from dataclasses import dataclass

from server.cli.common.failures import CommandError, ExitCode

RESERVED_FILES = 256  # for the database, blobs, uploads, jobs, logs and libraries; a start needs about 60
MIN_CONNECTIONS = 16
MOST_WANTED = 1 << 20  # no system needs more; some report a far larger limit


def bound(host: str, port: int) -> socket.socket:
    """A socket on that address that does not accept yet: a client that connects too early is refused at once.

    Raises CommandError: port_in_use, bad_host. OSError for the system's other reasons.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a part of the name is too long, or empty
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError("bad_host", f"--host {host}: {reason}", ExitCode.USAGE) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise CommandError("bad_host", f"--host {host}: not an address of this machine", ExitCode.USAGE) from error
        error.filename = f"{host}:{port}"  # the message begins with it
        raise


def port_in_use(host: str, port: int) -> CommandError:
    message = f"{host}:{port} is in use; stop what listens there, or give another --port"
    return CommandError("port_in_use", message, ExitCode.CONFLICT)


def url_of(listener: socket.socket) -> str:
    """The URL for a client on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class ConnectionLimits:
    """total: at once. each: of one address."""

    total: int
    each: int


def allowed_open_files() -> int:
    """How many files the system lets this process open, once its own limit is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return MOST_WANTED
    return max(soft, min(hard, MOST_WANTED))


def raise_soft_limit() -> int:
    """Raise this process's own limit of open files to what the system allows; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = allowed_open_files()
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # macOS reports a hard limit that it does not grant
        return soft
    return most


def limits_within(asked: ConnectionLimits, open_files: int) -> ConnectionLimits:
    """The limits asked for, or smaller ones if the system allows fewer open files.

    One address keeps its share of them, and at least half. Raises CommandError (too_few_files).
    """
    room = open_files - RESERVED_FILES
    if room < MIN_CONNECTIONS:
        least = RESERVED_FILES + MIN_CONNECTIONS
        message = f"the process may open {open_files} files and needs at least {least}; raise it with ulimit -n"
        raise CommandError("too_few_files", message, ExitCode.USAGE)
    if asked.total <= room:
        return asked
    return ConnectionLimits(room, min(asked.each, max(room // 2, asked.each * room // asked.total)))
