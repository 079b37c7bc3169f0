"""``python -m tests.fuzz``: whatever logs, baselines, variables and claim files hold, devguard prints no traceback.

Each target gets ``--count`` inputs: valid ones that are changed at random, and noise. Errors for the user
(`DevGuardError`) are answers; any other exception is a fault, and so is a terminal escape in what is printed. Prints
one line of JSON for each target; the exit status is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from devguard.activation import environment
from devguard.cli import log, variables
from devguard.doors.contexts import gpu_claims
from devguard.errors import DevGuardError
from devguard.ownership.resolve import LAUNCHERS, has_local_siblings, owner_from_environment
from devguard.reporting import actions

SITE = {"file": "server.py", "line": 43, "function": "receive"}
PROCESS = {"process": {"pid": 1, "parent": 1, "host": "node7", "command": "serve", "RANK": "3", "time": 1.5}}
CHILD = {"child": {"pid": 1, "signal": "SIGKILL"}, "time": 2.5}
STRAY = {
    "stray": 0, "door": "load", "action": "repaired", "source": "cuda:0", "target": "cuda:1", "count": 1, "bytes": 8,
    "pid": 1, "site": SITE, "via": None, "note": None, "owner": "cuda:1", "rank": "3",
}  # fmt: skip
END = {"end": {"process_owner": None, "owned": ["cuda:1"], "contexts": ["cuda:0"]}}
KNOWN = {
    "file": "server.py", "function": "receive", "door": "load", "action": "repaired", "owner": "cuda", "lines": [43],
}  # fmt: skip
BASELINE = {"devguard_baseline": 1, "strays": [KNOWN, {**KNOWN, "function": "gone", "reason": "known"}]}
ALERT = {"alert": "devguard is off", "time": 1.5}
CLAIM = {"pid": 1, "started": 1, "job": "", "local_rank": "0", "parent": "1 1", "index": 0, "visible": None}

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**4000, 1.5, 1e308, float("nan"), float("inf"), -0.0)
TEXTS = ("", "\0", "\x1b[31m", "\x9b", "\u202e", "\udcff", "\r\n", "é漢🙂", "x" * 5000, "cuda:0", "%s{0}", "../..")
WORDS = (
    "repair", "observe", "warn", "error", "off", "0", "1", "cpu", "cuda", "cuda:0", "cuda:1", "-1", "9" * 5000, "٣",
    "²", "load=warn", "load", "=", ",", "ipc=copy", "threads=off,load=error", "4(x2),3", "/tmp", "/dev/null",
    "x" * 5000, " ",
)  # fmt: skip
VARIABLES = (
    "DEVGUARD", "DEVGUARD_DEVICE", "DEVGUARD_DOORS", "DEVGUARD_LOG", "DEVGUARD_STRICT", "DEVGUARD_RANK_LOCK",
    "DEVGUARD_TRANSPORT", "DEVGUARD_TRANSPORT_BUDGET",
    "CUDA_VISIBLE_DEVICES", *(name for launcher in LAUNCHERS for name in (launcher.rank, *launcher.size)),
)  # fmt: skip


def noise(chance: random.Random) -> bytes:
    """Return bytes at random, or the beginning of something deep."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(chance.randrange(200))
    if kind == 1:
        return chance.choice([b"[", b'{"a":', b'{"process":', b"{"]) * chance.choice([1, 50, 3000])
    if kind == 2:
        return bytes(chance.choice(b'{}[]",:0123456789eE+-.\\ntfu \t\0\xff') for _ in range(chance.randrange(60)))
    return b"9" * chance.choice([1, 20, 21, 5000])


def value(chance: random.Random, depth: int = 3) -> Any:
    """Return a JSON value at random."""
    kind = chance.randrange(6 if depth else 4)
    if kind == 0:
        return chance.choice([None, True, False])
    if kind == 1:
        return chance.choice(NUMBERS)
    if kind == 2:
        return chance.choice(TEXTS)
    if kind == 3:
        return "".join(chr(chance.randrange(0x300)) for _ in range(chance.randrange(12)))
    inner = [value(chance, depth - 1) for _ in range(chance.randrange(4))]
    return inner if kind == 4 else dict(zip(map(str, [*TEXTS, "file", "line"]), inner, strict=False))


def change(chance: random.Random, found: Any) -> Any:
    """Return a copy of a JSON value with one part of it replaced, removed or added."""
    if isinstance(found, dict) and found and chance.random() < 0.9:
        name = chance.choice(list(found))
        if chance.random() < 0.15:
            return {key: each for key, each in found.items() if key != name}
        return {**found, name: change(chance, found[name])}
    if isinstance(found, list) and found and chance.random() < 0.7:
        return [change(chance, each) for each in found] * chance.choice([1, 1, 3])
    return value(chance)


def line(chance: random.Random, valid: tuple[Any, ...]) -> bytes:
    """Return one line: a valid one, a changed one, a damaged one, or noise."""
    if chance.random() < 0.2:
        return noise(chance)
    found = chance.choice(valid)
    for _ in range(chance.choice([0, 1, 1, 2])):
        found = change(chance, found)
    text = bytearray(json.dumps(found, ensure_ascii=chance.random() < 0.5).encode(errors="surrogateescape"))
    if text and chance.random() < 0.2:
        text[chance.randrange(len(text))] = chance.randrange(256)
    return bytes(text[: chance.randrange(len(text) + 1)] if chance.random() < 0.1 else text)


def fuzz_log(chance: random.Random, folder: Path) -> str:
    """Read a folder of logs, and print it in one of its formats."""
    write_log(chance, folder)
    options = ["--format", chance.choice(log.FORMATS)] if chance.random() < 0.6 else []
    options += ["--processes"] if chance.random() < 0.7 else []
    options += ["--fail-on", chance.choice(actions.FAIL_ON)] if chance.random() < 0.4 else []
    return print_log(folder, options)


def fuzz_baseline(chance: random.Random, folder: Path) -> str:
    """Judge a folder of logs by a baseline, and write the baseline again."""
    write_log(chance, folder)
    file = folder / "baseline.json"
    file.write_bytes(json.dumps(BASELINE).encode() if chance.random() < 0.4 else line(chance, (BASELINE,)))
    is_empty = not file.stat().st_size
    found = print_log(folder, ["--baseline", str(file), "--format", chance.choice(log.FORMATS)])
    again = print_log(folder, ["--write-baseline", str(file)])
    assert is_empty or (found == "refused") == (again == "refused"), again
    if again != "refused":
        assert print_log(folder, ["--baseline", str(file)]) != f"status {log.FAILED}"
    return found


def write_log(chance: random.Random, folder: Path) -> None:
    """Write the log of one process."""
    lines = [line(chance, (PROCESS, STRAY, STRAY, CHILD, END, ALERT)) for _ in range(chance.randrange(1, 6))]
    (folder / "1.jsonl").write_bytes(chance.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines))


@functools.cache
def log_parser() -> argparse.ArgumentParser:
    """Return the parser of ``devguard log``."""
    parser = argparse.ArgumentParser()
    log.configure(parser)
    return parser


def print_log(folder: Path, options: list[str]) -> str:
    """Run ``devguard log``; return its status, or that it refused its input."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = log.run(log_parser().parse_args([str(folder), *options]))
        except DevGuardError:
            return "refused"
    for shown in (out.getvalue(), err.getvalue()):
        assert shown.replace("\n", "").isprintable(), shown
    if "json" in options or "sarif" in options:
        json.loads(out.getvalue())
    return f"status {status}"


def fuzz_environment(chance: random.Random, folder: Path) -> str:
    """Read the settings and the owner from an environment."""
    environ = {}
    for name in chance.sample(VARIABLES, chance.randrange(1, 5)):
        words = [chance.choice(WORDS) for _ in range(chance.choice([1, 1, 1, 3]))]
        text = chance.choice(["", ",", "=", " "]).join(words) if chance.random() < 0.8 else str(value(chance, 0))
        environ[name] = os.fsdecode(os.fsencode(text.encode("utf-8", "surrogateescape"))).replace("\0", "")
    problems = variables.check_settings(environ)
    assert all(isinstance(problem, str) for problem in problems)
    has_local_siblings(environ)
    variables.select_relevant(environ)
    outcome = "settings"
    try:
        settings = environment.read(environ)
        assert not environment.find_problems(environ), settings
    except DevGuardError:
        assert problems
        outcome = "refused"
    with contextlib.suppress(DevGuardError):
        owner_from_environment(environ)
    return outcome


def fuzz_claims(chance: random.Random, folder: Path) -> str:
    """Read a file of claims, and judge and print what it holds."""
    rows = [change(chance, CLAIM) if chance.random() < 0.7 else CLAIM for _ in range(chance.randrange(4))]
    text = line(chance, (rows, [CLAIM])) if chance.random() < 0.5 else json.dumps(rows).encode()
    living = {**CLAIM, "pid": os.getppid(), "started": gpu_claims._start_time(os.getppid())}
    if chance.random() < 0.3:
        text = json.dumps([change(chance, living), living]).encode()
    (folder / "devguard").mkdir(mode=0o700, exist_ok=True)
    (folder / "devguard/GPU-1.json").write_bytes(text)
    others = gpu_claims.others("GPU-1")
    for other in others:
        gpu_claims.describe_clash(other, 0)
        str(other)
    return f"{min(len(others), 1)} claims"


TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "log": fuzz_log,
    "baseline": fuzz_baseline,
    "environment": fuzz_environment,
    "claims": fuzz_claims,
}


def run(name: str, count: int, seed: int) -> dict[str, Any]:
    """Run `count` inputs through one target; return the figures and the first faults."""
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place, _runtime_folder(place):
        for number in _progress(name, count):
            try:
                outcomes[TARGETS[name](random.Random(f"{seed} {name} {number}"), Path(place))] += 1
            except Exception:  # noqa: BLE001 - every exception is a fault, and is reported
                outcomes["faults"] += 1
                faults += [f"input {number}: {traceback.format_exc()}"] if len(faults) < 3 else []
    seconds = round(time.monotonic() - started, 1)
    return {"target": name, "inputs": count, "seed": seed, "seconds": seconds, **outcomes, "first": faults}


@contextlib.contextmanager
def _runtime_folder(place: str) -> Iterator[None]:
    """Keep the claims of this run in a folder of its own."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = place
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


def _progress(name: str, count: int) -> Iterator[int]:
    """Yield the numbers of the inputs, with a bar on standard error if that is a terminal."""
    for number in range(count):
        if sys.stderr.isatty() and number % max(1, count // 100) == 0:
            done = 30 * number // count
            print(
                f"\r{name:12} [{'#' * done}{'.' * (30 - done)}] {number}/{count}", end="", file=sys.stderr, flush=True
            )
        yield number
    if sys.stderr.isatty():
        print(f"\r{name:12} [{'#' * 30}] {count}/{count}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the targets that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="inputs for each target (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, action="append", help="a target (default: all)")
    arguments = parser.parse_args()
    found = [run(name, arguments.count, arguments.seed) for name in arguments.only or TARGETS]
    for figures in found:
        print(json.dumps(figures))
    return 1 if any(figures.get("faults") for figures in found) else 0


if __name__ == "__main__":
    sys.exit(main())
