"""Run code in processes that have imported torch and not initialised CUDA. One server forks them, which is fast."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_SERVER = """
import io, json, os, sys, traceback, contextlib
import torch, devguard
def answer(code):
    out = io.StringIO()
    names = {"__name__": "__main__", "json": json, "torch": torch, "devguard": devguard}
    names["ctx"] = lambda: [d.index for d in devguard.contexts()]
    with contextlib.redirect_stdout(out):
        try: exec(compile(code, "<string>", "exec"), names)
        except BaseException: return {"failed": traceback.format_exc()}
    strays = [] if names.get("QUIET") else [s.as_dict() for s in devguard.strays()]
    return {"failed": None, "out": out.getvalue().strip(), "strays": strays}
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.__stdout__.write(json.dumps(answer(json.loads(line))) + "\\n"); sys.__stdout__.flush()
        os._exit(0)
    os.waitpid(pid, 0)
"""


_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Let the next server import modules, which its processes then need not import themselves."""
    _preloaded[:] = modules


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "\n".join([*(f"import {module}" for module in _preloaded), _SERVER])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def stop() -> None:
    """Stop the server, if it runs."""
    _preloaded.clear()
    if _server.cache_info().currsize:
        server = _server()
        _server.cache_clear()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        server.stdout.close()
        server.wait()


def run(code: str) -> dict[str, Any]:
    """Run `code`, which can use torch, devguard, json and ``ctx()``; return its output (``out``) and its ``strays``."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(code) + "\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    assert answer["failed"] is None, answer["failed"]
    return answer


def strays(code: str, door: str) -> list[dict[str, Any]]:
    """Run `code` and return the strays of one door."""
    return [stray for stray in run(code)["strays"] if stray["door"] == door]
