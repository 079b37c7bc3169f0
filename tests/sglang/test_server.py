"""Parts of the test of a real server: its model, its changes to SGLang, and that no server outlives the test.

The whole test takes minutes and is a command: ``python -m tests.sglang.server``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from tests.helpers.simulated import ROOT, run_simulated
from tests.sglang import placement, questions, recorded, server
from tests.sglang.environment import POSSIBLE

needs_sglang = pytest.mark.skipif(not POSSIBLE, reason="SGLang 0.5.23 needs Python 3.11")


@needs_sglang
def test_answers_depend_on_the_image_and_the_plugin_leaves_pixels_on_gpu_0(tmp_path: Path) -> None:
    texts = server.make_checkpoint(tmp_path, [questions.picture(number) for number in range(3)])
    assert len(set(texts)) == 3
    assert all(text.isascii() and text.isprintable() for text in texts)
    program = """
        import json
        from importlib.metadata import entry_points
        import torch
        from tests.sglang import server_plugin

        (found,) = [one for one in entry_points(group="sglang.srt.plugins") if one.name == server_plugin.NAME]
        assert found.load() is server_plugin.plugin

        made = {name: torch.ones(4) for name in ("input_ids", "pixel_values", "image_grid_thw")}
        left = server_plugin.leave_on_gpu_0(made)
        devices = {name: str(value.device) for name, value in left.items()}
        hashed = server_plugin.hash_on_host(lambda found: [str(one.device) for one in found], [left["pixel_values"]])
        print(json.dumps([devices, hashed]))
    """
    done = run_simulated(program, env=server._environment(tmp_path, 2))
    assert done.result == [{"input_ids": "cpu", "pixel_values": "cuda:0", "image_grid_thw": "cuda:0"}, ["cpu"]]
    assert [device.context for device in done.me.devices] == [True, False]


SERVER = """
    import http.server, mmap, os, subprocess, sys, time
    shared = open(f"/dev/shm/devguard-test-{os.getpid()}", "w+b")
    shared.truncate(4096)
    mapped = mmap.mmap(shared.fileno(), 4096)
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    child.stdout.readline()
    print("child", child.pid, flush=True)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer((sys.argv[sys.argv.index("--host") + 1], port), Handler).serve_forever()
"""


def stand_in(folder: Path, program: str) -> dict[str, str]:
    """Return an environment in which SGLang's server is this program."""
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").touch()
    (folder / "sglang" / "launch_server.py").write_text(textwrap.dedent(program))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_no_process_or_file_of_a_server_is_left_even_if_a_child_ignores_sigterm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(ZeroDivisionError),
        server._server(tmp_path, stand_in(tmp_path, SERVER), log, 1, 1) as (process, port),
    ):
        server._wait_until_ready(process, port, log, time.monotonic() + 60)
        child = int(log.read_text().split()[1])
        assert is_running(child)
        assert server._group(process.pid) == {process.pid, child}
        shared = Path(f"/dev/shm/devguard-test-{process.pid}")
        assert shared.exists()
        raise ZeroDivisionError
    until = time.monotonic() + 60
    while is_running(child) and time.monotonic() < until:  # The kernel takes a moment to end a killed process.
        pass
    assert not is_running(child)
    assert not is_running(process.pid)
    assert not shared.exists()


def test_a_server_that_cannot_start_raises_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = stand_in(tmp_path, "raise SystemExit('no such model')")
    with (
        server._server(tmp_path, environment, log, 1, 1) as (process, port),
        pytest.raises(server.ServerError, match=r"ended with 1 .*\n.*no such model"),
    ):
        server._wait_until_ready(process, port, log, time.monotonic() + 60)


def test_waiting_for_a_server_that_never_becomes_ready_ends_in_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = stand_in(tmp_path, "import time; time.sleep(600)")
    with (
        server._server(tmp_path, environment, log, 1, 1) as (process, port),
        pytest.raises(server.ServerError, match="not ready in time"),
    ):
        server._wait_until_ready(process, port, log, time.monotonic() + 1)


def test_a_server_that_dies_while_answering_raises_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = """
        def do_POST(self):
            os.unlink(shared.name)
            print("out of order", flush=True)
            os._exit(3)
    """
    program = textwrap.dedent(SERVER).replace("port =", textwrap.indent(textwrap.dedent(dies), "    ") + "port =", 1)
    environment = stand_in(tmp_path, program)
    monkeypatch.setattr(server, "_environment", lambda folder, gpus: environment)
    with pytest.raises(server.ServerError, match=r"did not answer (.|\n)*out of order"):
        server._serve(tmp_path, {}, [questions.picture(0)], 1, 1, 60)


def test_after_a_failed_server_the_command_exits_with_1_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(folder: Path, *arguments: object, **options: object) -> None:
        (folder / "log").touch()
        raise server.ServerError("it did not start")

    monkeypatch.setattr(server, "make_checkpoint", lambda folder, images: [])
    monkeypatch.setattr(server, "compare", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    assert server.main(["--tp", "2"]) == 1
    assert "it did not start" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("guarded", "status", "verdict"),
    [
        (recorded.GUARDED_TP, 0, "holds"),
        (
            recorded.TENSOR_PARALLEL,
            1,
            "PROBLEM: with devguard: scheduler TP1 holds context + 2 MiB on GPU 0, not its own",
        ),
    ],
)
def test_the_command_prints_the_verdict_and_exits_with_it(
    guarded: placement.Served,
    status: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server, "make_checkpoint", lambda folder, images: ["a cat", "a cow"])
    monkeypatch.setattr(server, "compare", lambda folder, images, **options: (recorded.TENSOR_PARALLEL, guarded))
    assert server.main(["--tp", "2"]) == status
    printed = capsys.readouterr().out.splitlines()
    assert verdict in printed
    assert "transformers, without SGLang, gives the same answer to 1 of 2" in printed
    assert server.main(["--tp", "2", "--json"]) == status
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["tp"], row["dp"], bool(row["problems"])) == (2, 1, bool(status))
    assert [one["role"] for one in row["guarded"]["holdings"]] == [one.role for one in guarded.holdings]


@pytest.mark.parametrize("ranks", ["1", "17"])
def test_a_number_of_ranks_outside_the_range_is_refused(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        server.main(["--dp", ranks])
    assert "at least 2" in capsys.readouterr().err
