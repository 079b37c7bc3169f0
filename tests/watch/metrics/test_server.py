"""Metrics over HTTP, as Prometheus gets them."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics

from devguard import ConfigError
from devguard.reporting import sampler
from devguard.support import orphans
from devguard.support.orphans import Plan
from devguard.watch.metrics import server as metrics
from devguard.watch.metrics.families import series_names
from devguard.watch.metrics.server import Server, parse_address, serve
from devguard.watch.view import View
from tests.helpers.scrapes import OPENER, get, scrape
from tests.watch.metrics.test_counters import arena, running
from tests.watch.test_folder import STATE
from tests.watch.test_gpus import GIB
from tests.watch.test_view import GPUS, use

PID = os.getpid()


@pytest.fixture(autouse=True)
def _close_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "POLL_S", 0.01)


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> View:
    """This process, which owns the GPU b, has 300 MiB there, and an arena."""
    use(monkeypatch, {"uuid": "GPU-a"}, {"uuid": "GPU-b", "pids": {PID: 300 << 20}})
    monkeypatch.setattr(orphans, "find", lambda: Plan([], [], []))
    writer = running(tmp_path)
    writer.line({"state": {**STATE, **GPUS}, "time": 6.0})
    writer.row(0, 3)
    writer.sample(7.0, 2, arenas=[arena()])
    return View(tmp_path)


@pytest.fixture
def server(view: View) -> Iterator[Server]:
    with contextlib.closing(serve(view, ":0")) as running:
        yield running


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_scrape_has_all_series_and_equals_the_view(view: View, server: Server) -> None:
    found = scrape(server.url)
    assert found.keys() == series_names()
    seen = view.look()
    gpus = {column.uuid: column for column in seen.columns}
    assert found["devguard_process_gpu_memory_bytes"] == {
        (gpus[uuid].label, uuid, row.owner or "", row.name, cell.verdict): cell.bytes
        for row in seen.rows
        for uuid, cell in row.cells.items()
    }
    assert found["devguard_gpu_memory_used_bytes"] == {(gpu.label, gpu.uuid): gpu.used for gpu in seen.columns}
    assert found["devguard_gpu_memory_total_bytes"] == {("0", "a"): 80 * GIB, ("1", "b"): 80 * GIB}
    assert found["devguard_strays_total"] == {
        (line.site.action, line.site.door, "cuda:0", ""): line.site.count for line in seen.lines
    }
    ((row, held),) = seen.arenas
    assert found["devguard_transport_in_use_bytes"] == {(row.name, held["kind"]): held["in_use"]}
    assert server.problem is None


def test_openmetrics_is_served_on_request(server: Server) -> None:
    text = get(server.url, {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert text.endswith("# EOF\n")
    families = {family.name: family.type for family in openmetrics.text_string_to_metric_families(text)}
    assert families["devguard_strays"] == "counter"
    assert families["devguard_transport_release_seconds"] == "histogram"


def test_a_scrape_can_name_its_metrics(server: Server) -> None:
    assert scrape(f"{server.url}?name[]=devguard_scrape_success") == {"devguard_scrape_success": {(): 1}}


def test_a_scrape_that_fails_says_so_and_why(server: Server, tmp_path: Path) -> None:
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    found = scrape(server.url)
    assert found["devguard_scrape_success"] == {(): 0}
    assert "is not a folder" in (server.problem or "")
    tmp_path.mkdir()


def test_nothing_but_get_is_answered_and_nothing_is_printed(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="405"):
        OPENER.open(urllib.request.Request(server.url, method="POST", data=b"x"), timeout=30)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
        client.recv(1 << 16)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")  # and goes away
    get(server.url)
    assert capfd.readouterr() == ("", "")


def test_a_client_that_sends_nothing_is_let_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Request, "timeout", 0.05)
    with socket.create_connection((server.host, server.port)) as silent:
        silent.settimeout(30)
        get(server.url)  # others need not wait for it
        assert silent.recv(1) == b""


def test_the_processes_go_on_reporting_between_scrapes(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "TOUCH_S", 0.0)
    watched = tmp_path / sampler.WATCHED
    with contextlib.closing(serve(view, "0")):
        watched.unlink()  # it is there before the first scrape
        wait_for(watched.exists)


def test_the_processes_stop_reporting_where_nothing_scrapes(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "TOUCH_S", 0.0)
    monkeypatch.setattr(metrics, "ASKED_S", 0.0)
    ticks: list[bool] = []
    actions = metrics._Http.service_actions
    monkeypatch.setattr(metrics._Http, "service_actions", lambda self: (actions(self), ticks.append(True)))
    with contextlib.closing(serve(view, "0")):
        (tmp_path / sampler.WATCHED).unlink()
        wait_for(lambda: ticks)
        assert not (tmp_path / sampler.WATCHED).exists()


def test_it_listens_on_the_loopback_interface_alone(server: Server) -> None:
    assert (server.host, server.url) == ("127.0.0.1", f"http://127.0.0.1:{server.port}/metrics")
    assert server._http.socket.getsockname() == ("127.0.0.1", server.port)


def test_it_listens_on_ipv6(view: View) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(serve(view, "[::1]:0")) as server:
        assert server.url == f"http://[::1]:{server.port}/metrics"
        assert "devguard_scrape_success" in scrape(server.url)


def test_a_name_of_both_families_is_the_ipv4_address(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    both: list[Any] = [
        (family, socket.SOCK_STREAM, 6, "", place)
        for family, place in ((socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0)))
    ]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *names, **options: both)
        server = serve(view, "localhost:0")
    assert server.host == "127.0.0.1"
    server.close()


def test_after_close_the_port_is_free(view: View) -> None:
    server = serve(view, ":0")
    get(server.url)
    server.close()
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection(server.host, server.port, timeout=30).connect()
    serve(view, f":{server.port}").close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9109", ("127.0.0.1", 9109)),
        (":9109", ("127.0.0.1", 9109)),
        (" 0.0.0.0:0 ", ("0.0.0.0", 0)),
        ("node7.local:65535", ("node7.local", 65535)),
        ("[::1]:9109", ("::1", 9109)),
        ("[::]:9109", ("::", 9109)),
    ],
)
def test_an_address_is_a_port_with_or_without_a_host(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "host", "host:", "::1:9109", "::1", "[]:1", "1.2.3.4:65536", ":-1", ":9 1", ":٣"], ids=ascii
)
def test_another_address_is_refused_with_what_is_valid(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:9109 \(all interfaces\)") as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


def test_a_port_in_use_is_named(view: View, server: Server) -> None:
    with pytest.raises(ConfigError, match=rf"port {server.port} of 127\.0\.0\.1 is in use\. Choose another"):
        serve(view, f":{server.port}")


@pytest.mark.parametrize(
    ("address", "error", "expected"),
    [
        ("192.0.2.1:9109", None, "192.0.2.1 is no address of this machine"),
        ("no.such.host.invalid:9109", socket.gaierror(-2, "Name or service not known"), "cannot be found"),
        (f"{'x' * 70}:9109", None, "cannot be found"),
        (":80", PermissionError(13, "Permission denied"), "port 80 needs root. Choose one above 1023"),
        (":9109", OSError(24, "Too many open files"), "cannot listen: Too many open files."),
    ],
)
def test_an_address_that_cannot_be_had_is_explained(
    view: View, monkeypatch: pytest.MonkeyPatch, address: str, error: OSError | None, expected: str
) -> None:
    def fail(*names: Any, **options: Any) -> None:
        assert error is not None
        raise error

    with monkeypatch.context() as patch:
        if error is not None:
            patch.setattr(socket, "getaddrinfo", fail)
        with pytest.raises(ConfigError) as caught:
            serve(view, address)
    assert expected in str(caught.value)
    assert f"--serve '{address}'" in str(caught.value)


def test_without_prometheus_client_the_error_says_what_to_install(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'torch-devguard\[metrics\]'"):
        serve(view, ":0")
