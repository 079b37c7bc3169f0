"""The verdict on each cell, by what the processes wrote and what the driver says."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from devguard.logs.lines import Damage
from devguard.logs.reader import Merged, Process
from devguard.support import process_identity
from devguard.watch import matrix
from devguard.watch.folder import ProcessLog, Sample
from devguard.watch.gpus import Gpu
from devguard.watch.neighbours import Neighbour

MIB = 1 << 20
CONTEXT = 300 * MIB
UUIDS = [f"uuid-{index}" for index in range(4)]
US = os.geteuid()


def journal(pid: int, owner: str | None, memory: dict[str, int] | None = None, **known: Any) -> ProcessLog:
    """Return a running process that holds `memory` by device; None: it has written no sample."""
    contexts = known.pop("contexts", list(memory or {}))
    gpus = known.pop("gpus", {f"cuda:{index}": uuid for index, uuid in enumerate(UUIDS)})
    rows = dict(enumerate(known.pop("rows", ())))
    owned = [owner] if owner else []
    process = Process("x", pid, "here", "python train.py", owner=owner, owned=owned, contexts=contexts, gpus=gpus)
    for name, value in known.items():
        setattr(process, name, value)
    found = Running(process, Damage("x"), rows)
    if memory is not None:
        found.samples.append(Sample(1.0, {tag: (held, held, held) for tag, held in memory.items()}, 0))
    return found


class Running(ProcessLog):
    @property
    def pid(self) -> int | None:
        return self.process.pid

    def is_running(self) -> bool:
        return not self.process.ended


def driver(*held: dict[int, int | None]) -> list[Gpu]:
    return [Gpu(str(index), UUIDS[index], processes=each) for index, each in enumerate(held)]


def verdicts(journals: list[ProcessLog], gpus: list[Gpu] | None) -> dict[int, dict[str, str]]:
    found = matrix.build(journals, gpus, neighbour=lambda pid: Neighbour("python", US))
    return {row.pid: {uuid[-1]: cell.verdict for uuid, cell in row.cells.items()} for row in found.rows}


def site(door: str = "load", devices: str = "cuda:0 -> cuda:1", action: str = "observed", nbytes: int = 8) -> Merged:
    return Merged(door, action, "train.py", 3, "main", 1, nbytes, [devices], [1])


@pytest.mark.parametrize("has_driver", [False, True])
def test_a_healthy_program_is_a_diagonal(has_driver: bool) -> None:
    ranks = [journal(10 + index, f"cuda:{index}", {f"cuda:{index}": 100 * MIB}) for index in (2, 0, 1)]
    gpus = driver({10: CONTEXT + 100 * MIB}, {11: CONTEXT + 100 * MIB}, {12: CONTEXT + 101 * MIB})
    found = matrix.build(ranks, gpus if has_driver else None)
    assert [(row.pid, [uuid[-1] for uuid in row.cells]) for row in found.rows] == [
        (10, ["0"]),
        (11, ["1"]),
        (12, ["2"]),
    ]
    assert not found.has("STRAY")
    assert found.has("own")
    cell = found.rows[0].cells[UUIDS[0]]
    assert (cell.bytes, cell.whole) == ((CONTEXT + 100 * MIB, True) if has_driver else (100 * MIB, False))


@pytest.mark.parametrize(
    ("rank", "gpu_0", "expected"),
    [
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": MIB}), CONTEXT + MIB, "STRAY"),
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": 0}), CONTEXT + 5 * MIB, "ctx"),
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": 0}), CONTEXT + 50 * MIB, "STRAY"),  # not torch's memory
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": MIB}, allowed=["cuda:0"]), CONTEXT + MIB, "allowed"),
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": 0}, rows=[site("ipc")]), CONTEXT, "ipc"),
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": MIB}, rows=[site("ipc")]), CONTEXT, "STRAY"),
        (journal(1, "cuda:1", {"cuda:1": MIB, "cuda:0": MIB}, owned=["cuda:0", "cuda:1"]), CONTEXT, "own"),
        (journal(1, "cpu", {"cuda:1": MIB, "cuda:0": 0}), CONTEXT, "ctx"),
        (journal(1, None, {"cuda:1": MIB, "cuda:0": MIB}), CONTEXT + MIB, "?"),
        (journal(1, "cuda:1", None, contexts=["cuda:0", "cuda:1"]), CONTEXT + 5 * MIB, "ctx"),
        (journal(1, "cuda:1", None, contexts=["cuda:0", "cuda:1"]), CONTEXT + 50 * MIB, "STRAY"),
        (journal(1, "cuda:1", None, contexts=["cuda:0", "cuda:1"]), None, "ctx"),
        (journal(1, "cuda:1", None, contexts=["cuda:1"]), CONTEXT, "ctx"),  # the driver knows before the process
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_gpu_is_judged_by_what_the_process_holds_there(
    rank: ProcessLog, gpu_0: int | None, expected: str
) -> None:
    other = journal(2, "cuda:0", {"cuda:0": 9 * MIB})
    gpus = driver({1: gpu_0, 2: CONTEXT + 9 * MIB}, {1: CONTEXT + MIB})
    assert verdicts([rank, other], gpus)[1]["0"] == expected


def test_contexts_are_compared_with_those_of_guarded_processes_on_the_same_product() -> None:
    """A context on a larger GPU is larger, and that of a program without torch is smaller."""
    rank = journal(1, "cuda:0", {"cuda:0": 9 * MIB, "cuda:1": 0})
    models = [
        Gpu("0", UUIDS[0], "A10", processes={1: 250 * MIB + 9 * MIB}),
        Gpu("1", UUIDS[1], "H100", processes={1: 480 * MIB}),
    ]
    assert verdicts([rank], models)[1] == {"0": "own", "1": "ctx"}
    assert verdicts([rank], driver({1: CONTEXT + 9 * MIB}, {1: CONTEXT, 7: 60 * MIB}))[1] == {"0": "own", "1": "ctx"}


def test_a_gpu_that_the_driver_does_not_list_has_a_column_where_a_process_is_on_it() -> None:
    rank = journal(1, "cuda:0", {"cuda:0": MIB, "cuda:1": MIB}, gpus={f"cuda:{n}": f"{n}" * 12 for n in range(3)})
    found = matrix.build([rank], [Gpu("0", "0" * 12)])
    assert [(column.label, column.uuid) for column in found.columns] == [("0", "0" * 12), ("1" * 8, "1" * 12)]
    assert found.has("STRAY")


def test_a_gpu_that_nothing_touches_has_no_cell() -> None:
    assert verdicts([journal(1, "cuda:1", {"cuda:1": MIB})], driver({}, {1: CONTEXT}, {})) == {1: {"1": "own"}}


def test_visible_devices_are_joined_by_uuid() -> None:
    second = journal(2, "cuda:0", {"cuda:0": MIB}, gpus={"cuda:0": UUIDS[3]})
    assert verdicts([second], driver({}, {}, {}, {2: CONTEXT})) == {2: {"3": "own"}}
    assert verdicts([second], None) == {2: {"3": "own"}}


def test_without_a_driver_a_process_that_has_not_named_its_gpus_is_shown_by_their_names() -> None:
    found = matrix.build([journal(1, "cuda:1", None, contexts=["cuda:0"], gpus={})], None)
    assert [(column.label, column.uuid) for column in found.columns] == [("cuda:0", "cuda:0")]
    assert found.rows[0].cells["cuda:0"].verdict == "ctx"


def test_a_process_without_devguard_is_never_a_stray() -> None:
    processes = {7: Neighbour("jupyter", US), 8: Neighbour("python (bob)", US + 1), 9: Neighbour("worker", 0, 1)}
    gpus = driver({7: 9 * CONTEXT, 8: 5, 9: None}, {7: 9 * CONTEXT, 1: CONTEXT})
    found = matrix.build([journal(1, "cuda:1", {"cuda:1": 0})], gpus, neighbour=processes.__getitem__)
    shown = {row.pid: (row.name, row.owner, [cell.verdict for cell in row.cells.values()]) for row in found.rows[1:]}
    assert shown == {
        7: ("jupyter", None, ["?", "?"]),
        8: ("python (bob)", None, ["foreign"]),
        9: ("worker", None, ["?"]),  # a child of the watched process, of another user
    }


def test_ended_processes_are_shown_only_afterwards() -> None:
    ended = journal(1, "cuda:1", {"cuda:1": MIB}, ended=True)
    assert matrix.build([ended], None).rows == ()
    (row,) = matrix.build([ended], None, keep_ended=True).rows
    assert not row.running


def test_a_process_after_its_last_line_keeps_its_owner_while_it_is_on_a_gpu() -> None:
    this = process_identity.started(os.getpid())
    leaving = journal(os.getpid(), "cuda:1", {"cuda:1": MIB}, ended=True, started=this)
    assert verdicts([leaving], driver({}, {os.getpid(): CONTEXT})) == {os.getpid(): {"1": "own"}}
    assert verdicts([leaving], driver({}, {})) == {}
    reused = journal(os.getpid(), "cuda:1", {"cuda:1": MIB}, ended=True, started=this - 1)
    assert verdicts([reused], driver({}, {os.getpid(): CONTEXT})) == {os.getpid(): {"1": "?"}}


def test_lines_that_were_left_alone_come_first() -> None:
    rank = journal(1, "cuda:1", {"cuda:1": 0}, rows=[site(action="repaired", nbytes=99), site(), site(nbytes=50)])
    found = matrix.build([rank], None)
    assert [(line.site.action, line.site.bytes) for line in found.lines] == [
        ("observed", 50),
        ("observed", 8),
        ("repaired", 99),
    ]
    assert found.rows[0].strays == 2


@pytest.mark.parametrize(
    ("process", "name"),
    [
        (Process("x", 1, command="python -m sglang", source="SGLang scheduler TP0", rank="1"), "scheduler TP0"),
        (Process("x", 1, command="python a/train.py", source="install", rank="3"), "rank 3 train.py"),
        (Process("x", 1, command="python a/train.py", source=None), "train.py"),
        (Process("x", 1), "?"),
    ],
)
def test_a_process_is_named_by_its_role_its_rank_or_its_program(process: Process, name: str) -> None:
    assert matrix.name_of(process) == name


def test_all_of_it_is_plain_data() -> None:
    rank = journal(1, "cuda:1", {"cuda:0": MIB, "cuda:1": MIB}, rows=[site()])
    found = matrix.build([rank], None, notes=["no driver"]).as_dict()
    assert found["processes"][0]["cells"][UUIDS[0]] == {"verdict": "STRAY", "bytes": MIB, "whole": False}
    assert (found["strays"][0]["pid"], found["strays"][0]["file"], found["notes"]) == (1, "train.py", ["no driver"])


def test_no_value_of_a_log_takes_the_place_of_the_pid_of_an_arena() -> None:
    rank = journal(1, "cuda:1", {"cuda:1": MIB})
    (sample,) = rank.samples
    rank.samples = [dataclasses.replace(sample, arenas=({"pid": 7, "budget": 5},))]
    assert matrix.build([rank], None).as_dict()["arenas"] == [{"pid": 1, "budget": 5}]
