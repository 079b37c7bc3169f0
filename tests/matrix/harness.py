"""Run cases quickly: each in a fork of a process that has imported torch but not initialised CUDA.

The process reads lines of JSON, ``["CASE", "MODE"]``, and answers each with a line of JSON. `Server` is the other end.

A case is a small user program in cases/: ``stray()`` strays as the class describes, on the line marked ``# STRAY``;
``behaves()`` does the same work correctly. A case may also define:

- ``before(mode)``, which runs first, outside the guard;
- ``guarded(mode, work)``, which runs `work` inside its own guard of that mode;
- ``REPAIRED(result)``, which returns whether the result of stray() is on the owner, cuda:1;
- ``STRAYS(result)`` and ``WORKERS(result)``, which return the strays and the pids of child processes;
- ``OPENS``: devices with a context that is open before any repair.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["MODES", "OWNER", "Server", "row"]

OWNER = 1
MODES = ("unguarded", "observe", "repair", "error", "behaves", "allowed")
MODULES = ["tests.matrix.cases", "some_library"]  # Allowed to stray in the mode "allowed".
TIMEOUT_S = 120


class Server:
    """One process that runs cases; used by one thread."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.matrix.harness"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, env=dict(environment), cwd=root, text=True, **pipes)  # type: ignore[call-overload]

    def run(self, case: str, mode: str) -> dict[str, Any]:
        """Run one case in one mode; return the result of `report`."""
        self._process.stdin.write(json.dumps([case, mode]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        report: dict[str, Any] = json.loads(answer) if answer else {"failed": "the process that runs cases has ended"}
        if "failed" in report:
            raise RuntimeError(f"{case}, {mode}: {report['failed']}")
        return report

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def main() -> int:
    """Answer until the other end is closed."""
    import torch  # noqa: F401 - imported once for all cases

    import devguard  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_in_a_fork(*json.loads(line))), flush=True)
    return 0


def _in_a_fork(case: str, mode: str) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as noise:
        pid = os.fork()
        if pid == 0:
            _silence(noise.fileno())
            try:
                answer.write(json.dumps(report(case, mode)))
            except BaseException:  # noqa: BLE001 - the other end raises it
                answer.write(json.dumps({"failed": traceback.format_exc()}))
            answer.flush()
            os._exit(0)  # Does not wait for threads such as those of NCCL.
        deadline = threading.Timer(TIMEOUT_S, os.kill, (pid, 9))
        deadline.start()
        _, status = os.waitpid(pid, 0)
        deadline.cancel()
        answer.seek(0)
        noise.seek(0)
        text = answer.read()
        found: dict[str, Any] = json.loads(text) if text else {"failed": f"wait status {status}\n{noise.read()}"}
        return found


def _silence(descriptor: int) -> None:
    """Redirect the output of a case into a file, and its input to nothing."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def report(case: str, mode: str) -> dict[str, Any]:
    """Run one case in one mode in this process."""
    warnings.simplefilter("ignore")
    import torch

    import devguard

    module = importlib.import_module(f"tests.matrix.cases.{case}")
    found: dict[str, Any] = {"error": None, "repaired": None, "pids": [os.getpid()]}
    getattr(module, "before", lambda mode: None)(mode)
    work = module.behaves if mode == "behaves" else module.stray
    strays: list[dict[str, Any]] = []
    try:
        if mode == "unguarded":
            torch.cuda.set_device(OWNER)
            result = work()
        else:
            if mode == "allowed":
                devguard.allow("cuda:0", "cuda:1", modules=MODULES)
            strict = mode in ("behaves", "allowed")
            result = getattr(module, "guarded", _guarded)("error" if strict else mode, work)
        found["repaired"] = bool(module.REPAIRED(result)) if hasattr(module, "REPAIRED") else None
        strays += getattr(module, "STRAYS", lambda result: [])(result)
        found["pids"] += getattr(module, "WORKERS", lambda result: [])(result)
    except Exception as error:  # noqa: BLE001 - an error of a case is a part of its report
        found["error"] = f"{type(error).__name__}: {error}"
    if mode != "unguarded":
        strays += map(row, devguard.strays())
    return {**found, "strays": strays, "opens": getattr(module, "OPENS", ()), "verdicts": _verdicts()}


def _verdicts() -> dict[str, str]:
    """Return the verdict of devguard watch on each device that this process holds something on, by its own log."""
    from devguard.logs.lines import Damage
    from devguard.logs.reader import Process
    from devguard.reporting import process_state, sampler
    from devguard.reporting.journal import journal
    from devguard.watch import matrix
    from devguard.watch.folder import ProcessLog

    log = ProcessLog(Process("log", os.getpid()), Damage("log"))
    log.read({"state": process_state.owners(), "time": 1.0})
    log.read({"now": sampler.take_sample(), "time": 1.0})
    for number, stray in enumerate(journal.strays()):
        log.read({"stray": number, **json.loads(json.dumps(stray.as_dict()))})
    (found,) = matrix.build([log], None, keep_ended=True).rows
    tags = {uuid: tag for tag, uuid in log.process.gpus.items()}
    return {tags.get(uuid, uuid): cell.verdict for uuid, cell in found.cells.items()}


def _guarded(mode: Any, work: Any) -> Any:
    import devguard

    with devguard.guard(OWNER, mode=mode):
        return work()


def row(stray: Any) -> dict[str, Any]:
    """Return the fields of one stray that the table needs."""
    site = stray.site
    return {
        "door": stray.door,
        "action": stray.action,
        "source": stray.source,
        "file": site and os.path.basename(site.file),
        "line": site and site.line,
    }


if __name__ == "__main__":
    sys.exit(main())
