"""The HTTP server of ``devguard watch --serve``, for Prometheus.

It listens on the loopback interface unless an address is named, because it asks for no password: what can reach the
port can read the names of processes, their owners and their GPU memory.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from devguard.errors import ConfigError
from devguard.watch.view import View

__all__ = ["parse_address", "serve", "Server"]

LOOPBACK = "127.0.0.1"
TOUCH_S = 2.0  # The processes stop to report their memory after 5 s, and scrapes are farther apart.
ASKED_S = 300.0  # how long after the last scrape they go on
POLL_S = 0.5  # between looks whether it is to be closed
REQUEST_S = 10.0  # how long a client may take for its request


class Server:
    """A server in a thread, from `serve`.

    Attributes
    ----------
    host : str
        The address on which it listens.
    port : int
        The port.
    """

    def __init__(self, http: _Http, problem: Callable[[], str | None]) -> None:
        self.host, self.port = http.server_name, http.server_port
        self._http, self._problem = http, problem
        self._thread = threading.Thread(target=http.serve_forever, args=(POLL_S,), name="devguard-metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/metrics"

    @property
    def problem(self) -> str | None:
        """What the last scrape could not read."""
        return self._problem()

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def serve(view: View, address: str, *, label_pid: bool = False) -> Server:
    """Serve the metrics of a view over HTTP.

    Parameters
    ----------
    view : View
        What to look at: at each scrape, and at most once a second.
    address : str
        Where to listen; see `parse_address`.
    label_pid : bool
        Whether the series of processes have the label ``pid``.

    Raises
    ------
    ConfigError
        prometheus_client is not installed; the address is not valid, not of this machine or in use.
    """
    host, port = parse_address(address)
    try:
        from prometheus_client import CollectorRegistry, make_wsgi_app
    except ImportError:
        raise ConfigError(
            "serving metrics needs prometheus_client. Install it: pip install 'torch-devguard[metrics]'"
        ) from None
    from devguard.watch.metrics.collector import Collector  # needs prometheus_client

    collector, registry = Collector(view, label_pid=label_pid), CollectorRegistry()
    registry.register(collector)
    touched = time.monotonic()

    def keep_reporting() -> None:
        nonlocal touched
        now = time.monotonic()
        if now - touched >= TOUCH_S and now - collector.asked < ASKED_S:
            touched = now
            view.touch()

    http = _open(host, port, address, keep_reporting)
    view.touch()  # so that the first scrape finds something
    http.set_app(make_wsgi_app(registry))
    return Server(http, lambda: collector.problem)


def parse_address(text: str) -> tuple[str, int]:
    """Return the address and the port of ``--serve``: ``9109``, ``:9109``, ``ADDRESS:9109`` or ``[IPV6]:9109``.

    Without an address it is the loopback interface. Port 0 is any free one.

    Raises
    ------
    ConfigError
        If it has another form.
    """
    host, _, number = text.strip().rpartition(":")
    is_number = number.isascii() and number.isdecimal() and len(number) < 6
    has_brackets = host.startswith("[") and host.endswith("]")
    if not is_number or int(number) > 65535 or host == "[]" or (":" in host and not has_brackets):
        raise ConfigError(
            f"--serve {text!r}: valid is a port, such as 9109 (of {LOOPBACK}), or an address with a port, such as "
            "0.0.0.0:9109 (all interfaces) or [::1]:9109. The port is at most 65535."
        )
    return host.strip("[]") or LOOPBACK, int(number)


class _Http(ThreadingMixIn, WSGIServer):
    """One thread for each request. It prints nothing, because a screen may be there."""

    daemon_threads = True

    def __init__(self, family: int, place: Any, tick: Callable[[], None]) -> None:
        self.address_family = family
        self._tick = tick
        super().__init__(place, _Request)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own would ask a name server for the name of the address
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def service_actions(self) -> None:
        self._tick()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone, or is too slow."""


class _Request(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes are not logged."""


def _open(host: str, port: int, address: str, tick: Callable[[], None]) -> _Http:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, place = min(found, key=lambda each: each[0] != socket.AF_INET)  # localhost is 127.0.0.1
        return _Http(family, place, tick)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that is none
        raise ConfigError(f"--serve {address!r}: {_explain(error, host, port)}") from None


def _explain(error: OSError | UnicodeError, host: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"port {port} of {host} is in use. Choose another one, or port 0 for any; `ss -ltnp` names its process."
    if number == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine. `ip address` names them; 0.0.0.0 is all of them."
    if number in (errno.EACCES, errno.EPERM):
        return f"port {port} needs root. Choose one above 1023, such as 9109."
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"the address {host!r} cannot be found. Name one of this machine, such as {LOOPBACK} or 0.0.0.0."
    return f"cannot listen: {os.strerror(number) if number else error}."
