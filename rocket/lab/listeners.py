"""The API's address: taken before anything is started, so that a port in use is known at once."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any

from rocket.cluster import directories
from rocket.cluster.errors import PortInUse
from rocket.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rocket.lab.settings import Settings


@contextlib.contextmanager
def listeners(settings: Settings) -> Iterator[list[socket.socket]]:
    """Hold the API's address by a socket for each of its workers; who connects waits until one accepts.

    Raise `InvalidSetting` for an address that cannot be had, and `PortInUse`.
    """
    where = f"{settings.host}, port {settings.api_port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.api_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InvalidSetting(f"cannot listen on {where}: {error}") from None
    if settings.api_workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
        raise InvalidSetting(f"--api-workers {settings.api_workers} needs SO_REUSEPORT, unknown to this system")
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(_listener(family, kind, address))
            if settings.api_workers == 1:
                held = [alone]
            else:
                # Those who share a port do not notice other programs that would share it. So it was taken alone
                # first: that fails beside any listener, and two programs that start at once exclude each other.
                address = alone.getsockname()
                alone.close()
                held = [
                    stack.enter_context(_listener(family, kind, address, shared=True))
                    for _ in range(settings.api_workers)
                ]
        except OSError as error:
            who = ""
            if error.errno == errno.EADDRINUSE:
                who = f"{directories.port_holder(settings.api_port)}; --api-port 0 takes any free one"
            raise PortInUse(f"cannot listen on {where}: {error.strerror}{who}") from None
        yield held


def _listener(
    family: socket.AddressFamily, kind: socket.SocketKind, address: Any, *, shared: bool = False
) -> socket.socket:
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(0)  # a second bind would go unnoticed without
    except OSError:
        listener.close()
        raise
    return listener


def url_of(settings: Settings, held: Sequence[socket.socket]) -> str:
    """Return where the API is to be found: behind these listeners or, without any, where the settings say."""
    port = held[0].getsockname()[1] if held else settings.api_port
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104 - no bind
    return f"http://[{host}]:{port}" if ":" in host and "[" not in host else f"http://{host}:{port}"
