"""Log folders as devguard writes them, for tests of what reads them: each process is a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START = 1_750_000_000.0  # seconds since 1970
MIB = 1 << 20
UUIDS = {f"cuda:{index}": f"uuid-{index}" for index in range(4)}


class Log:
    """The log of one process, which writes its lines at once.

    The times of all methods are seconds after `START`.
    """

    def __init__(self, folder: Path, pid: int, time: float = 0.0, **first: Any) -> None:
        self.path = folder / f"here-{pid}-1.jsonl"
        self.pid = pid
        process = {"pid": pid, "parent": 1, "host": "here", "command": f"python serve.py {pid}", "devguard": "0.1.0"}
        self._state: dict[str, Any] = {}
        self._rows = 0
        self.write({"process": {**process, "time": START + time, **first}})

    def write(self, line: Mapping[str, Any] | str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")

    def state(self, time: float, owner: str | None, contexts: Sequence[str] = (), **known: Any) -> None:
        self._state = {
            "process_owner": owner,
            "owned": [owner] if owner else [],
            "contexts": list(contexts),
            "transport": None,
            "said_by": "install",
            "process_mode": "repair",
            "gpus": UUIDS,
            "allowed": [],
            **known,
        }
        self.write({"state": self._state, "time": START + time})

    def sample(self, time: float, memory: Mapping[str, int], strays: int = 0, **lists: Any) -> None:
        held = {tag: [size, size, size] for tag, size in memory.items()}
        self.write({"now": {"memory": held, "strays": strays, **lists}, "time": START + time})

    def stray(self, time: float, source: str = "cuda:0", target: str = "cuda:1", **known: Any) -> None:
        row = {
            "door": "load",
            "source": source,
            "target": target,
            "owner": "cuda:1",
            "action": "repaired" if source != target else "observed",
            "dtype": None,
            "shape": None,
            "pid": self.pid,
            "thread": "MainThread",
            "rank": None,
            "time": START + time,
            "site": {"file": "/srv/train.py", "line": 7, "function": "main"},
            "via": None,
            "note": None,
            "stack": [],
            "count": 1,
            "bytes": 8,
            **known,
        }
        self.write({"stray": self._rows, **row})
        self._rows += 1

    def alert(self, text: str) -> None:
        self.write({"alert": text, "time": START})

    def child(self, time: float, pid: int, signal: str = "SIGKILL") -> None:
        self.write({"child": {"pid": pid, "signal": signal}, "time": START + time})

    def end(self, time: float, **known: Any) -> None:
        self.write({"end": {**self._state, "time": START + time, "strays": 0, "strays_not_kept": 0, **known}})


def make_run(folder: Path) -> Path:
    """Write the run of a server: one rank with memory on another GPU, one with a context there, one killed."""
    folder.mkdir(exist_ok=True)
    first = Log(folder, 10, 0.0, RANK="0", torch="2.13.0")
    first.state(1.0, "cuda:0", ["cuda:0"])
    first.sample(2.0, {"cuda:0": 100 * MIB})
    first.child(9.0, 13)
    first.end(10.0)
    second = Log(folder, 11, 0.5, RANK="1", torch="2.13.0")
    second.state(1.5, "cuda:1", ["cuda:1"])
    second.sample(2.5, {"cuda:1": 200 * MIB})
    second.state(3.0, "cuda:1", ["cuda:0", "cuda:1"])
    second.stray(3.0, "cuda:0", "cuda:0", count=3, bytes=3 * MIB + 1, rank="1")
    second.stray(3.5, "cuda:0", "cuda:1", count=5, bytes=5 * MIB, rank="1")
    second.sample(4.0, {"cuda:0": 3 * MIB + 512, "cuda:1": 200 * MIB}, strays=8)
    second.sample(6.0, {"cuda:0": 7 * MIB + 512, "cuda:1": 210 * MIB}, strays=8)
    second.sample(8.0, {"cuda:0": MIB, "cuda:1": 210 * MIB}, strays=8)
    second.end(10.0)
    third = Log(folder, 12, 0.6, RANK="2", torch="2.13.0")
    third.state(1.6, "cuda:2", ["cuda:2", "cuda:0"])
    third.sample(2.6, {"cuda:2": 300 * MIB, "cuda:0": 0})
    third.end(10.0)
    fourth = Log(folder, 13, 0.7, RANK="3", torch="2.13.0")
    fourth.state(1.7, "cuda:3", ["cuda:3"])
    fourth.sample(2.7, {"cuda:3": 400 * MIB})
    return folder
