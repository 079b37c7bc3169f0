"""``python -m tests.chaos``: an arena, its router and its readers in rounds of random faults.

In each round a sender puts payloads that prove themselves, a router passes their handles on and opens nothing, and
readers get, view and skip them, while processes are killed, stopped and forked, handles are lost, and requests are
cancelled. At the end of each round no byte was wrong, no process is stuck, the budget is whole, /dev/shm is empty, and
the processes that have survived hold no descriptor and no map more than before. The same seed plans the same events;
when they happen depends on the machine. Prints one line of JSON; the exit status is 1 after the first faulty round.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.cast import Crew, Fault
from tests.chaos.mutants import MUTANTS
from tests.chaos.rounds import Round

BAR = 30
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def isolate() -> bool:
    """Give this process a /dev/shm of its own, where others put nothing; return whether the system allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    return not libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)


class Progress:
    """One line on standard error: rewritten on a terminal, and elsewhere one for each tenth."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.begin = rounds, time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def show(self, done: int, counts: Counter[str]) -> None:
        if not self.is_terminal and done * 10 // self.rounds == (done - 1) * 10 // self.rounds:
            return
        full = BAR * done // self.rounds
        rate = done / (time.monotonic() - self.begin)
        kills = sum(count for name, count in counts.items() if name.startswith("kill"))
        text = (
            f"[{'#' * full}{'.' * (BAR - full)}] {done}/{self.rounds} rounds, {rate:.1f}/s, "
            f"{counts['read: ok']} reads, {kills} kills, {counts['cancel']} cancels"
        )
        print(f"\r\x1b[K{text}" if self.is_terminal else text, end="" if self.is_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        if self.is_terminal:
            print(file=sys.stderr)


def percentile(values: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def run(seed: int, first: int, rounds: int, bound: float, mutant: str | None) -> dict[str, Any]:
    """Run rounds until one is faulty; return the figures."""
    own_shm = isolate()
    shm = sorted(os.listdir("/dev/shm"))
    crew, counts, latencies = Crew(mutant), Counter[str](), list[float]()
    progress, begin, done, faults = Progress(rounds), time.monotonic(), 0, Counter[str]()
    for number in range(first, first + rounds):
        one = Round(crew, seed, number, bound)
        try:
            one.run()
            if own_shm and (left := sorted(set(os.listdir("/dev/shm")) - set(shm))):
                raise Fault(f"/dev/shm holds {left}")
        except Fault as fault:
            text = str(fault)
            faults["wrong" if text.startswith("wrong") else "stuck" if text.startswith("stuck") else "other"] += 1
            report(one, seed, fault)
        finally:
            counts += one.counts
            latencies += one.latencies
        if faults:
            kill_all(one)
            break
        done += 1
        progress.show(done, counts)
    progress.end()
    crew.end()
    seconds = time.monotonic() - begin
    deaths = {"count": len(latencies)}
    if latencies:
        shares = {"median_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
        deaths |= {name: percentile(latencies, share) for name, share in shares.items()}
    return {
        "rounds": done,
        "seed": seed,
        "wrong": faults["wrong"],
        "stuck": faults["stuck"],
        "other_faults": faults["other"],
        "own_dev_shm": own_shm,
        "seconds": round(seconds, 1),
        "rounds_per_second": round(done / seconds, 1),
        "from_the_notice_of_a_death_to_the_end_of_its_leases": deaths,
        "counts": dict(sorted(counts.items())),
    }


def report(one: Round, seed: int, fault: Fault) -> None:
    """Print what has happened in a faulty round, and the stacks of its processes."""
    lines = [f"Fault in round {one.number} of seed {seed}: {fault}", *one.events]
    lines.append(f"Again: python -m tests.chaos --seed {seed} --first {one.number} --rounds 1")
    print("\n".join(["", *lines]), file=sys.stderr, flush=True)
    if "stuck" in str(fault):
        for process in one.processes:
            if process.is_alive and str(process.pid) in str(fault):
                print(f"{process.role} {process.pid}:", file=sys.stderr, flush=True)
                for pid in (process.pid, *children_of(process.pid)):
                    os.kill(pid, signal.SIGUSR1)
                    time.sleep(0.2)  # it writes its stacks to the same standard error


def children_of(pid: int) -> list[int]:
    """Return the child processes of a process."""
    return [
        int(child)
        for thread in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
    ]


def kill_all(one: Round) -> None:
    for child in one.children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for process in one.processes:
        if process.is_alive:
            os.kill(process.pid, signal.SIGKILL)
            process.forget()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is planned (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round (default: 0)")
    parser.add_argument("--bound", type=float, default=15.0, help="seconds until a process is stuck (default: 15)")
    parser.add_argument("--mutant", choices=MUTANTS, help="plant a fault into the ledger, which a round must find")
    arguments = parser.parse_args()
    figures = run(arguments.seed, arguments.first, arguments.rounds, arguments.bound, arguments.mutant)
    print(json.dumps(figures))
    return 1 if figures["wrong"] or figures["stuck"] or figures["other_faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
