"""A guess repairs in a process that has siblings; elsewhere it observes, and the program is told once.

Each test runs a whole program under ``DEVGUARD``, as a user does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import fresh
from tests.helpers.simulated import ROOT

PRELUDE = """
import json, os, pickle, sys, time
import torch, devguard
from devguard.cli.selfcheck import tagged_pickle
def loads(tag): return str(pickle.loads(tagged_pickle(tag)).device)
"""
ONLY_OBSERVES = "devguard only observes in this process"

# How the main thread selects cuda:1.
SELECTIONS = {
    "set_device": "torch.cuda.set_device(1)",
    "set_device by name": "torch.cuda.set_device('cuda:1')",
    "set_stream": "torch.cuda.set_stream(torch.cuda.Stream(1))",
    "accelerator": "torch.accelerator.set_device_index(1)",
}


def run(code: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program; variables of launchers and of devguard are those in `environ`."""
    kept = ("DEVGUARD_CACHE_DIR", "DEVGUARD_SIM_")
    base = {name: value for name, value in os.environ.items() if "DEVGUARD" not in name or name.startswith(kept)}
    done = subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + code],
        env=base | {"DEVGUARD": "repair"} | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def reports(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if ONLY_OBSERVES in line]


def logged(folder: Path) -> list[str]:
    lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
    return [line["alert"] for line in lines if "alert" in line]


@pytest.fixture(autouse=True, scope="module")
def _server() -> Iterator[None]:
    """Use one server of forks for all tests here that need no program of their own."""
    yield
    fresh.stop()


def alerts(code: str, **environ: str) -> list[str]:
    """Run `code` after an activation in a process without CUDA, and the look at its end; return all alerts."""
    before = f"""
import os, pickle, sys
from devguard.activation import activate
from devguard.cli.selfcheck import tagged_pickle
from devguard.support import notices
def loads(tag): return str(pickle.loads(tagged_pickle(tag)).device)
environ = { ({"DEVGUARD": "repair"} | environ)!r}
os.environ.update(environ)
activate.activate(environ)
QUIET = True
notices.print_error = lambda text: True
"""
    after = "\nactivate._look_at_end(); print(json.dumps(notices.alerts()))"
    return list(json.loads(fresh.run(before + code + after)["out"].splitlines()[-1]))


def test_a_single_program_reports_once_that_it_only_observes_and_what_to_write(tmp_path: Path) -> None:
    code = "torch.cuda.set_device(1)\nfor _ in range(3): print(loads('cuda:0'))\nprint(loads('cuda:2'))"
    done = run(code, "-W", "ignore", DEVGUARD_LOG=str(tmp_path))
    assert done.stdout.split() == ["cuda:0"] * 3 + ["cuda:2"]
    (text,) = reports(done)
    for part in (
        "its mode is repair",
        "owns cuda:1 is a guess",
        "--device cuda:1",
        "DEVGUARD_DEVICE=cuda:1",
        "guard(1)",
    ):
        assert part in text
    assert logged(tmp_path) == [text]


def test_an_error_filter_does_not_make_the_report_an_error() -> None:
    done = run("torch.cuda.set_device(1); print(loads('cuda:0'))", "-W", "error", DEVGUARD="error")
    assert done.stdout.split() == ["cuda:0"]
    assert len(reports(done)) == 1


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("mode", ["repair", "error", "warn"])
def test_every_mode_that_does_more_than_observe_is_reported(selection: str, mode: str) -> None:
    (text,) = alerts(f"{SELECTIONS[selection]}; assert loads('cuda:0') == 'cuda:0'; loads('cuda:2')", DEVGUARD=mode)
    assert f"its mode is {mode}: that this process owns cuda:1 is a guess" in text


def test_modes_of_single_doors_are_reported_too() -> None:
    code = "torch.cuda.set_device(1); loads('cuda:0')"
    (text,) = alerts(code, DEVGUARD="observe", DEVGUARD_DOORS="load=repair")
    assert "its mode is load=repair" in text


@pytest.mark.parametrize("code", ["torch.cuda.set_device(1); loads('cuda:0')", "loads('cuda:0')"])
def test_a_program_that_asked_for_no_more_is_not_told(code: str) -> None:
    assert alerts(code, DEVGUARD="observe") == []


SILENT = {
    "no stray": ("torch.cuda.set_device(1); loads('cuda:1'); torch.ones(2, device='cuda')", {}),
    "a named device": ("torch.cuda.set_device(2); loads('cuda:0')", {"DEVGUARD_DEVICE": "cuda:1"}),
    "one of several": ("torch.cuda.set_device(1); loads('cuda:0')", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
    "a guard in the program": ("with devguard.guard(1): loads('cuda:0')", {}),
    "installed in the program": ("devguard.install(device=1); loads('cuda:0')", {}),
    "unguarded": ("torch.cuda.set_device(1)\nwith devguard.unguarded(): loads('cuda:0')", {}),
    "an allowed device": ("torch.cuda.set_device(1); devguard.allow('cuda:0'); loads('cuda:0')", {}),
    "no GPU is used": ("import threading; threading.Thread(target=print).start(); torch.ones(2)", {}),
    "uninstalled": ("torch.cuda.set_device(1); devguard.uninstall(); loads('cuda:0')", {}),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_program_in_which_nothing_was_left_out_is_not_told(case: str) -> None:
    code, environ = SILENT[case]
    assert alerts(code, **environ) == []


def test_a_program_that_sees_one_gpu_is_not_told() -> None:
    assert reports(run("loads('cuda:0'); torch.ones(2, device='cuda')", CUDA_VISIBLE_DEVICES="2")) == []


# A program that selects no device, so that there is no guess either.
@pytest.mark.parametrize("use", ["loads('cuda:3')", "torch.ones(2).to('cuda:2')", "torch.ones(2).to('cuda')"])
def test_a_program_without_any_candidate_is_told_once(use: str) -> None:
    (text,) = alerts(f"{use}; {use}")
    assert "cannot tell which GPU" in text
    assert "devguard run --device cuda:1" in text


def test_data_that_arrives_without_a_candidate_is_reported_at_once() -> None:
    """A notebook may have no orderly end, and shows standard error at once."""
    done = run("loads('cuda:0'); sys.stdout.flush(); os._exit(0)")
    assert len(reports(done)) == 1


def test_contexts_of_a_single_program_beside_its_guess_are_reported_at_its_end() -> None:
    (text,) = alerts("torch.cuda.set_device(1); torch.ones(2).to('cuda:3')")
    assert "owns cuda:1 is a guess" in text


def test_a_child_process_with_a_python_of_its_own_is_told_itself() -> None:
    code = f"""
import subprocess
child = {PRELUDE!r} + "torch.cuda.set_device(int(sys.argv[1])); print(loads('cuda:0'), flush=True)"
for index in ("1", "2"): subprocess.run([sys.executable, "-c", child, index], check=True)
"""
    done = run(code)
    assert done.stdout.split() == ["cuda:0", "cuda:0"]
    assert [f"cuda:{index}" in text for index, text in zip((1, 2), reports(done), strict=True)] == [True, True]


FORKS = """
def fork(work):
    pid = os.fork()
    if pid == 0:
        try: work()
        except BaseException: import traceback; traceback.print_exc(); os._exit(1)
        finally: sys.stdout.flush(); sys.stderr.flush()
        os._exit(0)
    return pid
def wait(pid): assert os.waitpid(pid, 0)[1] == 0
def serve(index):
    torch.cuda.set_device(index)
    several = devguard.status()["adoption"]["one_of_several"]
    line = json.dumps([index, loads('cuda:0'), devguard.contexts()[0].index, several])
    os.write(1, (line + "\\n").encode())  # at once, because several workers write
"""


def served(done: subprocess.CompletedProcess[str]) -> list[Any]:
    return sorted(json.loads(line) for line in done.stdout.splitlines())


REPAIRED = [[1, "cuda:1", 1, True], [2, "cuda:2", 2, True], [3, "cuda:3", 3, True]]


def test_forked_workers_of_one_parent_repair() -> None:
    """As gunicorn, which forks its workers with `os.fork`."""
    done = run(f"{FORKS}\npids = [fork(lambda: serve(index)) for index in (1, 2, 3)]\nfor pid in pids: wait(pid)")
    assert served(done) == REPAIRED
    assert reports(done) == []


def test_workers_forked_one_after_the_other_repair() -> None:
    done = run(f"{FORKS}\nfor index in (1, 2, 3): wait(fork(lambda: serve(index)))")
    assert served(done) == REPAIRED
    assert reports(done) == []


def test_workers_of_a_daemon_repair_and_the_daemon_itself_does_not() -> None:
    code = f"""{FORKS}
def daemon():
    os.setsid()
    for index in (1, 2, 3): wait(fork(lambda: serve(index)))
    print(json.dumps([0, devguard.status()["adoption"]["one_of_several"]]), flush=True)
read, write = os.pipe()
if os.fork():  # the parent ends, and the pipe tells the test when the daemon has
    os.close(write); os.read(read, 1); os._exit(0)
os.close(read)
if os.fork(): os._exit(0)
parent = os.getppid()
while os.getppid() == parent and parent != 1: time.sleep(0.01)
daemon()
"""
    done = run(code)
    assert served(done) == [[0, False], *REPAIRED]


def test_a_daemon_that_selects_a_device_only_observes_and_is_told() -> None:
    code = f"""{FORKS}
read, write = os.pipe()
if os.fork(): os.close(write); os.read(read, 1); os._exit(0)
os.close(read); parent = os.getppid()
if os.fork(): os._exit(0)
while os.getppid() == parent or os.getppid() == 0: time.sleep(0.01)
time.sleep(0) ; torch.cuda.set_device(1); print(loads('cuda:0'), flush=True)
"""
    done = run(code)
    assert done.stdout.split() == ["cuda:0"]
    assert len(reports(done)) == 1


def test_a_worker_that_a_worker_forked_repairs() -> None:
    done = run(f"{FORKS}\nwait(fork(lambda: [wait(fork(lambda: serve(index))) for index in (1, 2, 3)]))")
    assert served(done) == REPAIRED


def test_a_single_process_that_forked_workers_does_not_repair_itself() -> None:
    done = run(
        f"{FORKS}\nwait(fork(lambda: serve(1)))\ntorch.cuda.set_device(2); print(json.dumps([2, loads('cuda:0')]))"
    )
    assert served(done) == [REPAIRED[0], [2, "cuda:0"]]
    assert len(reports(done)) == 1


def test_a_refuted_guess_is_reported_whatever_the_warnings_filter(tmp_path: Path) -> None:
    code = f"""{FORKS}
def work():
    serve(1); torch.cuda.set_device(3); print(json.dumps([3, loads('cuda:0')]), flush=True)
wait(fork(work))
"""
    done = run(code, "-W", "ignore", DEVGUARD_LOG=str(tmp_path))
    assert served(done) == [REPAIRED[0], [3, "cuda:0"]]
    (text,) = [line for line in done.stderr.splitlines() if "now only observes" in line]
    assert "owns cuda:1" in text
    assert logged(tmp_path) == [text]
