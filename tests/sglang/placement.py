"""Judge what each process of a server holds on each GPU; server.py starts the servers and observes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from devguard.simgpu import DeviceState

__all__ = ["Answer", "Holding", "Served", "problems", "role", "table"]

TOKENIZER = "tokenizer"
HELPER = "helper"  # For example the resource tracker of multiprocessing.
WITHOUT_GPU = ("DP controller", "detokenizer")
_TITLES = {"data_parallel_controller": "DP controller", "detokenizer": "detokenizer"}


@dataclasses.dataclass(frozen=True)
class Holding:
    """One process of a server, and what it holds on each GPU."""

    pid: int
    role: str
    owner: int | None  # The index of the GPU that the process may use; None: no GPU.
    devices: tuple[DeviceState, ...]  # Empty: the process never initialised CUDA.

    def on(self, index: int) -> DeviceState | None:
        """Return the state of a GPU on which the process holds or held something, or None."""
        for device in self.devices:
            if device.index == index and (device.context or device.bytes or device.peak_bytes):
                return device
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return the holding as plain data, fit for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A server's answer to one request."""

    status: int
    text: str
    logprobs: tuple[float, ...]  # Of the tokens of the text.


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that has served all requests."""

    answers: tuple[Answer, ...]
    holdings: tuple[Holding, ...]
    seconds: float  # From start to readiness.
    log_lines: tuple[str, ...] = ()  # devguard's lines in the server's log


def role(title: str, *, leader: bool, tp: int) -> tuple[str, int | None]:
    """Return the name of a process and the GPU that it owns, from the title that SGLang gave it.

    ``leader`` is the process that was started. It makes the images' tensors on GPU 0 and so may hold them there.
    """
    if leader:
        return TOKENIZER, 0
    kind, colon, name = title.partition("::")
    if kind != "sglang" or not colon:
        return HELPER, None
    if not name.startswith("scheduler"):
        return _TITLES.get(name, name), None
    ranks = {word[:2]: int(word[2:]) for word in name.split("_")[1:]}
    return " ".join(["scheduler", *name.split("_")[1:]]), ranks.get("DP", 0) * tp + ranks.get("TP", 0)


def expected(tp: int, dp: int) -> set[str]:
    """Return the processes that a server must have had."""
    if dp > 1:
        ranks = {f"scheduler DP{d}" + (f" TP{t}" if tp > 1 else "") for d in range(dp) for t in range(tp)}
        return ranks | {TOKENIZER, *WITHOUT_GPU}
    return {f"scheduler TP{t}" if tp > 1 else "scheduler" for t in range(tp)} | {TOKENIZER, "detokenizer"}


def problems(without: Served, guarded: Served, *, tp: int, dp: int) -> list[str]:
    """Return what is wrong with devguard, and what does not show the bug without it; empty if all is right."""
    found = []
    for name, served in (("without devguard", without), ("with devguard", guarded)):
        missing = expected(tp, dp) - {one.role for one in served.holdings}
        found += [f"{name}: no {process} was seen" for process in sorted(missing)]
        refused = sorted({answer.status for answer in served.answers if answer.status != 200})
        if refused or not served.answers:
            found.append(f"{name}: {'answers ' + str(refused) if refused else 'no answers'}")
    found += _differences(without.answers, guarded.answers)
    for one in without.holdings:  # If the bug does not show without devguard, the comparison proves nothing.
        receives = one.role.startswith("scheduler") or one.role == "DP controller"
        if receives and one.owner != 0 and one.on(0) is None:
            found.append(f"without devguard: {one.role} holds nothing on GPU 0, so this run does not show the bug")
    for one in guarded.holdings:
        for device in one.devices:
            if device.index != one.owner and one.on(device.index):
                found.append(f"with devguard: {one.role} holds {_cell(device)} on GPU {device.index}, not its own")
        if one.role.startswith("scheduler") and not _has_bytes(one):
            found.append(f"with devguard: {one.role} never had a byte on its own GPU {one.owner}")
    return found


def _differences(without: Sequence[Answer], guarded: Sequence[Answer]) -> list[str]:
    found = []
    if [one.text for one in without] != [one.text for one in guarded]:
        found.append("the answers differ with and without devguard")
    if without and len({one.text for one in without}) == 1:
        found.append("every image had the same answer, so equal answers show nothing")
    return found


def _has_bytes(one: Holding) -> bool:
    device = None if one.owner is None else one.on(one.owner)
    return device is not None and device.peak_bytes > 0


def _cell(device: DeviceState | None) -> str:
    if device is None:
        return "-"
    return " + ".join(["context"] * device.context + [f"{max(device.bytes, device.peak_bytes) / (1 << 20):g} MiB"])


def table(without: Served, guarded: Served, gpus: int) -> str:
    """Return a table of both servers, a row a process; a mark shows what is on a GPU that the process does not own."""
    rows = [["process", "owns", *(f"GPU {k}" for _ in range(2) for k in range(gpus))]]
    names = dict.fromkeys(one.role for served in (without, guarded) for one in served.holdings)
    for name in names:
        cells, owner = [], None
        for served in (without, guarded):
            one = next((one for one in served.holdings if one.role == name), None)
            owner = one.owner if one else owner
            for k in range(gpus):
                device = one.on(k) if one else None
                cells.append(_cell(device) + (" !" if one and device and k != one.owner else ""))
        rows.append([name, "cpu" if owner is None else f"cuda:{owner}", *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left, middle = sum(widths[:2]) + 2, sum(widths[2 : 2 + gpus]) + 2 * (gpus - 1)
    heading = " " * (left + 2) + "without devguard".ljust(middle) + "  with DEVGUARD=repair"
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([heading.rstrip(), *lines])
