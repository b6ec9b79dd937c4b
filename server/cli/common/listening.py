"""The address a server listens on. Decides when the port is taken; accepts nothing."""

from __future__ import annotations

import errno
import socket

from server.cli.common.failures import CommandError, ExitCode


def bound(host: str, port: int) -> socket.socket:
    """A socket on that address that does not accept yet: a client that connects too early is refused at once.

    Raises CommandError: port_in_use, bad_host. OSError for the system's other reasons.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CommandError("bad_host", f"--host {host}: {error.strerror}", ExitCode.USAGE) from error
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
        raise


def port_in_use(host: str, port: int) -> CommandError:
    message = f"{host}:{port} is in use; stop what listens there, or give another --port"
    return CommandError("port_in_use", message, ExitCode.CONFLICT)


def url_of(listener: socket.socket) -> str:
    """The URL for a client on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
