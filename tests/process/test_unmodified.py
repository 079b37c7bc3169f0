"""``devguard run`` with a program that does not use devguard, on simulated GPUs: every process it starts is guarded.

All tests check the processes of one run: their own reports, the records of the simulated GPUs, and the log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from devguard import cli
from devguard.cli.selfcheck import tagged_pickle
from tests.helpers.simulated import ROOT

PROGRAM = ROOT / "tests" / "process" / "unmodified.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unmodified")


@pytest.fixture(scope="module")
def done(folder: Path, run_simulated: Any) -> Any:
    (folder / "message").write_bytes(tagged_pickle("cuda:0"))
    options = ["--mode", "repair", "--log", str(folder / "logs")]
    program = [sys.executable, "-W", "error::RuntimeWarning", PROGRAM, folder / "message"]
    return run_simulated(["-m", "devguard", "run", *options, "--", *program], gpus=4)


@pytest.fixture
def log(done: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["log", str(folder / "logs"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_process_keeps_the_message_on_its_own_gpu(done: Any) -> None:
    (line,) = done.stderr.splitlines()  # The program itself is a single process with a guess.
    assert (
        "only observes in this process, although its mode is repair: that this process owns cuda:1 is a guess" in line
    )
    own = [[rank, [f"cuda:{rank}", [rank]]] for rank in (1, 2)]
    assert done.result == {
        "mode": "repair",
        "fork": own,
        "forkserver": own,
        "spawn": own[:1],
        "mp.spawn": [["cuda:0", [0]], ["cuda:1", [1]]],
        "subprocess": ["cuda:3", [3]],
        "DataLoader fork": [["cpu", []]],
        "DataLoader forkserver": [["cpu", []]],
        "this process": ["cuda:0", [0, 1]],  # A single process without a named owner is only observed.
    }


def test_only_rank_0_of_mp_spawn_and_the_program_ever_touched_gpu_0(done: Any) -> None:
    on_gpu_0 = [process.pid for process in done.state if process.devices[0].context]
    assert len(on_gpu_0) == 2, "rank 0 of mp.spawn, and the program itself"
    assert done.pid in on_gpu_0


def test_the_log_merges_the_processes_per_call_site(done: Any, log: dict[str, Any]) -> None:
    loads = {site["action"]: site for site in log["strays"] if site["door"] == "load"}
    line = next(n for n, text in enumerate(PROGRAM.read_text().splitlines(), 1) if "pickle.loads" in text)
    assert {(site["file"], site["line"], site["function"]) for site in loads.values()} == {
        (str(PROGRAM), line, "receive")
    }
    # 2 x 3 by fork, 2 x 3 by forkserver, 3 by spawn, and 1 each by rank 1 of mp.spawn, sh and the two loaders.
    assert loads["repaired"]["count"] == 5 * 3 + 4
    assert loads["repaired"]["bytes"] == 32 * (5 * 3 + 4)
    assert len(loads["repaired"]["processes"]) == 9
    assert set(loads["repaired"]["devices"]) == {
        f"cuda:0 -> {owner}" for owner in ("cuda:1", "cuda:2", "cuda:3", "cpu")
    }
    assert (loads["observed"]["count"], loads["observed"]["processes"]) == (1, [done.pid])
    assert log["strays"].index(loads["repaired"]) == 0
    assert log["damaged"] == []


def test_the_log_has_the_end_of_every_process_that_strayed(done: Any, log: dict[str, Any]) -> None:
    assert len({process["file"] for process in log["processes"]}) == len(log["processes"])
    (repaired,) = [site for site in log["strays"] if site["door"] == "load" and site["action"] == "repaired"]
    ends = [process for process in log["processes"] if process["pid"] in repaired["processes"]]
    assert [process["ended"] for process in ends] == [True] * 9
    assert sorted(process["owner"] for process in ends) == ["cpu", "cpu", *["cuda:1"] * 4, *["cuda:2"] * 2, "cuda:3"]
    for process in ends:
        assert process["contexts"] == ([] if process["owner"] == "cpu" else [process["owner"]])
