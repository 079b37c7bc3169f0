"""Object collectives of ``torch.distributed`` over gloo, in two real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import tagging
from tests.helpers.simulated import ROOT

RANK = Path(__file__).parent / "gloo_rank.py"


def ranks(folder: Path, how: str) -> list[Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    environ["GLOO_SOCKET_IFNAME"] = "lo"
    running = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(folder / "rendezvous"), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for rank in range(2)
    ]
    results = []
    try:
        for process in running:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return results


def test_object_collectives_are_repaired_on_every_rank(tmp_path: Path) -> None:
    for rank, result in enumerate(ranks(tmp_path, "guarded")):
        assert result["all_gather_object"] == [[0, 0], [1, 1]]
        assert result["broadcast_object_list"] == (None if rank == 0 else [0, 0])
        strays = result["strays"]
        assert {stray["source"] for stray in strays} == {"cuda:3"}
        assert {stray["action"] for stray in strays} == {"repaired"}
        assert {stray["file"] for stray in strays} == {str(RANK)}
        expected = ["dist.all_gather_object", "dist.broadcast_object_list"][: rank + 1]
        assert sorted(stray["line"].partition("(")[0] for stray in strays) == expected


def test_object_collectives_fail_with_the_door_closed(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, "unguarded")
    assert tagging.REFUSAL in first["all_gather_object"]
    assert tagging.REFUSAL in second["all_gather_object"]
    assert tagging.REFUSAL in second["broadcast_object_list"]
    assert first["strays"] == second["strays"] == []
